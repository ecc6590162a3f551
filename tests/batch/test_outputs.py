from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.batch.outputs import (
    NAME_BYTES,
    OutputFolder,
    case_key,
    name_problem,
    output_path,
)
from pipeline.errors import ConfigError, RunStoppedError
from pipeline.io import RESULT_ENDINGS

LONGEST = NAME_BYTES - max(map(len, RESULT_ENDINGS))  # bytes of a name
GOOD = [
    "a",
    "sub-01/anat/T1w",
    "ö ü",
    "a.b",
    ".hidden",
    "a..b",
    "...",
    "a" * LONGEST,
    "d" * 255 + "/a",
]
BAD = {
    "": "empty",
    ".": "empty",
    "a\0b": "NUL",
    "/a": "leads out",
    "../a": "leads out",
    "a/../../b": "leads out",
    "a/..": "leads out",
    ".volseg/a": "keeps its records",
    "a//b": "another way to write a/b",
    "./a": "another way to write a",
    "a/": "another way to write a",
    "a" * (LONGEST + 1): f"the name has {LONGEST + 1} bytes",
    "ö" * 119: "the name has 238 bytes",
    "d" * 256 + "/a": "a folder's name has 256 bytes",
}
WINDOWS = [
    "con", "a/NUL", "nul.x", "COM1", "lpt9.nii", "a:b", "a?", "x/a*b", "a\\b", "a.", "a ", "x. /a",
    "c:/a", "AUX .b",
]  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_good_names_are_accepted_and_can_be_written(name: str, tmp_path: Path) -> None:
    """With all endings of an output."""
    assert name_problem(name, windows=False) == ""
    path = output_path(tmp_path, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    assert path.resolve().is_relative_to(tmp_path.resolve())


@pytest.mark.parametrize("name", BAD, ids=lambda name: name[:10])
def test_bad_names_are_refused(name: str) -> None:
    """The message says why."""
    assert BAD[name] in name_problem(name, windows=False)


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_has_more_rules(name: str) -> None:
    """Devices, forbidden characters, and dots and spaces at the end."""
    assert name_problem(name, windows=True) != ""
    assert name_problem(name, windows=False) == ""


def test_names_that_are_good_on_windows() -> None:
    """A reserved name within a longer one is good."""
    for name in ("a", "console", "xcon", "sub/aux1", "com0", "com10", "a b", "a.b"):
        assert name_problem(name, windows=True) == ""


def test_different_cases_have_different_keys() -> None:
    """Also where the names differ in bytes that are no characters."""
    names = ["a", "A", "a/b", "a_b", "\udcfc", "\udcfd", "ü", "u\u0308"]
    assert len({case_key(name) for name in names}) == len(names)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """As where a file has its name."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(ConfigError, match="results cannot be written there"):
            OutputFolder.create(path)


def test_a_folder_that_is_gone_or_replaced_is_noticed(tmp_path: Path) -> None:
    """It is not made again: nobody would look for results there."""
    out = OutputFolder.create(tmp_path / "out")
    out.check(out.record("a"))
    out.root.rename(tmp_path / "moved")
    with pytest.raises(RunStoppedError, match="removed or replaced"):
        out.check(out.record("a"))
    OutputFolder.create(tmp_path / "out")
    with pytest.raises(RunStoppedError, match="removed or replaced"):
        out.check(out.record("a"))
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "moved").rename(tmp_path / "out")
    out.check(out.record("a"))
    shutil.rmtree(out.state)
    with pytest.raises(RunStoppedError, match="removed or replaced"):
        out.check(out.record("a"))


def test_a_link_that_leads_out_is_refused_and_one_within_is_not(tmp_path: Path) -> None:
    """Also where a folder above the output folder is a link."""
    (tmp_path / "real").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    out = OutputFolder.create(tmp_path / "link" / "out")
    (out.root / "sub").mkdir()
    (out.root / "inside").symlink_to(out.root / "sub")
    (out.root / "outside").symlink_to(tmp_path / "elsewhere")
    out.check(output_path(out.root, "sub/a"))
    out.check(output_path(out.root, "inside/a"))
    out.check(output_path(out.root, "new/folder/a"))
    with pytest.raises(RunStoppedError, match="a link leads out"):
        out.check(output_path(out.root, "outside/a"))
