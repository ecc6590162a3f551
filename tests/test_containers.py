"""The container recipes agree with the package and with each other; no builder is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from pathspec import GitIgnoreSpec

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
APPTAINER = (ROOT / "apptainer.def").read_text()
BASE = r"^FROM (\S+)"
INSTALL = r"pip install ((?:[^\n]|\\\n)*)"


def version() -> str:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return setup["metadata"]["version"]


def copied() -> set[str]:
    """The files and folders of the checkout that the Dockerfile copies."""
    lines = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
    return {name for line in lines for name in line.split()[:-1]}


def section(name: str) -> str:
    found = re.search(rf"^%{name}\n(.*?)(?=^%|\Z)", APPTAINER, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def test_what_is_copied_exists_and_is_sent_to_the_builder() -> None:
    """Nothing of it is left out by .dockerignore, and nothing else is sent."""
    ignored = GitIgnoreSpec.from_lines((ROOT / ".dockerignore").read_text().splitlines())
    for name in copied():
        assert (ROOT / name).exists()
        assert not ignored.match_file(name)
    sent = {path.name for path in ROOT.iterdir() if not ignored.match_file(path.name)}
    assert sent == copied()
    assert not ignored.match_file("bundles/brain_mr_structures/models/model.pt")
    assert ignored.match_file("bundles/brain_mr_structures/train/checkpoint.pt")


def test_both_recipes_copy_and_install_the_same() -> None:
    files = dict(line.split() for line in section("files").splitlines() if line.strip())
    assert set(files) == copied()
    assert all(place == f"/source/{name}" for name, place in files.items())
    ours, theirs = (re.search(INSTALL, text) for text in (DOCKERFILE, APPTAINER))
    assert ours is not None
    assert theirs is not None
    index = re.search(r"^ARG TORCH_INDEX=(\S+)", DOCKERFILE, re.MULTILINE)
    assert index is not None
    words = ours[1].replace('"$TORCH_INDEX"', index[1]).replace("\\\n", " ").split()
    assert words == theirs[1].replace("\\\n", " ").split()
    assert words[words.index("--constraint") + 1] == "constraints.txt"


def test_both_recipes_start_from_the_tested_python() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    bases = {
        *re.findall(BASE, DOCKERFILE, re.MULTILINE),
        *re.findall(r"^From: (\S+)", APPTAINER, re.MULTILINE),
    }
    assert len(bases) == 1
    python = setup["options"]["python_requires"].removeprefix(">=")
    assert bases.pop().startswith(f"python:{python}-slim-")


@pytest.mark.parametrize("text", [DOCKERFILE, APPTAINER], ids=["docker", "apptainer"])
def test_the_version_is_that_of_the_package(text: str) -> None:
    versions = re.findall(r"(?:image\.version[ =]\"?|volseg:)(\d+\.\d+[^\"\s]*)", text)
    assert set(versions) == {version()}
    assert re.search(
        rf"VOLSEG_CONTAINER=(docker|apptainer):volseg:{re.escape(version())}$", text, re.M
    )


def test_it_runs_volseg_without_root() -> None:
    instructions = re.findall(r"^(USER|ENTRYPOINT) (.+)$", DOCKERFILE, re.MULTILINE)
    assert instructions == [("USER", "1000"), ("ENTRYPOINT", '["volseg"]')]
    assert section("runscript").split() == ["exec", "volseg", '"$@"']


@pytest.mark.slow
def test_hadolint_finds_nothing() -> None:
    command = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run(
        [command, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
