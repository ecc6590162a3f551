from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from phantom import make_bundle, nifti, save, smooth

from pipeline.cli.app import main

SMALL = (9, 11, 8)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two small good volumes."""
    for i, name in enumerate("ab"):
        save(tmp_path / "in" / f"{name}.nii.gz", nifti(smooth(SMALL, seed=i)))
    return tmp_path


def test_help_needs_nothing_slow() -> None:
    """`volseg --help` and the help of each command import no torch, MONAI, numpy or nibabel."""
    code = (
        "import sys; from pipeline.cli import main\n"
        "for command in [[], *([name] for name in main.commands)]:\n"
        "    main([*command, '--help'], standalone_mode=False)\n"
        "slow = {'torch', 'monai', 'numpy', 'nibabel', 'ignite', 'SimpleITK', 'rich', 'yaml'}\n"
        "slow &= set(sys.modules)\n"
        "sys.exit(f'imported {slow}' if slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def commands(group: click.Group = main, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command as the words that call it, those of sub-groups included."""
    found = []
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found += commands(command, (*path, name))
        else:
            found.append((*path, name))
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_each_command_explains_its_options(words: tuple[str, ...]) -> None:
    """Help exits 0 and has every option with a sentence of its own, verbosity included."""
    result = run(*words, "--help")
    assert result.exit_code == 0
    command: click.Command = main
    for word in words:
        assert isinstance(command, click.Group)
        command = command.commands[word]
    assert {"verbose", "quiet"} <= {parameter.name for parameter in command.params}
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert all(option in result.output for option in parameter.opts)
            assert parameter.help is not None
            assert parameter.help.endswith(".")


def test_all_done_is_status_0(tiny_bundle: Path, folder: Path) -> None:
    """A line a case on stderr, nothing on stdout."""
    result = run(
        "segment", folder / "in", "-o", folder / "out", "-b", tiny_bundle, "--device", "cpu"
    )
    assert (result.exit_code, result.stdout) == (0, "")
    *lines, last = result.stderr.splitlines()
    assert [line[:6] for line in lines] == ["[1/2] ", "[2/2] "]
    # several processes may end in any order
    assert sorted(line[6:] for line in lines) == ["done     a", "done     b"]
    assert last == f"2 of 2 cases are in {folder / 'out'}"


def test_a_failed_case_is_status_1(tiny_bundle_3d: Path, folder: Path) -> None:
    """It is named with its reason, without a traceback, and the others are written."""
    (folder / "in" / "a.nii.gz").write_bytes(b"")
    result = run(
        "segment", folder / "in", "-o", folder / "out", "-b", tiny_bundle_3d, "--device", "cpu"
    )
    assert result.exit_code == 1
    assert f"/2] failed   a: {folder}/in/a.nii.gz: the file is empty" in result.stderr
    assert f"1 of 2 cases are in {folder / 'out'}, 1 failed (see cases.csv)" in result.stderr
    assert "Traceback" not in result.output
    assert (folder / "out" / "b_seg.nii.gz").is_file()


def test_json_is_for_machines(tiny_bundle_3d: Path, folder: Path) -> None:
    """stdout holds the rows of cases.csv as JSON and nothing else."""
    result = run(
        "segment",
        folder / "in",
        "-o",
        folder / "out",
        "-b",
        tiny_bundle_3d,
        "--device",
        "cpu",
        "--json",
    )
    assert [(row["case"], row["status"]) for row in json.loads(result.stdout)] == [
        ("a", "done"),
        ("b", "done"),
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["segment", "{in}/none.nii", "-o", "{out}", "-b", "{bundle}"],
            "none.nii: no such file or folder",
        ),
        (
            ["segment", "{in}", "{in}", "-o", "{in}/a.nii.gz/x", "-b", "{bundle}"],
            "cannot be written",
        ),
        (
            ["segment", "{in}", "-o", "{out}", "-b", "none"],
            "none: no such bundle; expected a folder with configs/inference.yaml",
        ),
        (
            ["segment", "{in}", "-o", "{out}", "-b", "{bundle}", "--overlap", "1"],
            "overlap: expected a fraction, 0 ≤ overlap < 1",
        ),
        (
            ["segment", "{in}", "-o", "{out}", "-b", "{bundle}", "--overlap", "half"],
            "'half' is not a valid float",
        ),
        (
            ["segment", "{in}", "-o", "{out}", "-b", "{bundle}", "--device", "tpu"],
            "'tpu' is not one of",
        ),
        (["segment", "{in}"], "Missing option '-o'"),
        (["segment", "-o", "{out}", "-b", "{bundle}"], "Missing argument 'INPUT...'"),
        (["segmnt"], "No such command 'segmnt'"),
        (["bundle", "check", "none"], "none: no such bundle"),
        (
            ["train", "none.yaml"],
            "none.yaml: cannot be read (No such file or directory); expected the YAML file of the "
            "run",
        ),
    ],
)
def test_a_wrong_command_is_status_2(
    arguments: list[str], says: str, tiny_bundle_3d: Path, folder: Path
) -> None:
    """One message on stderr that says what was expected; nothing is written."""
    places = {"in": folder / "in", "out": folder / "out", "bundle": tiny_bundle_3d}
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == 2
    assert says in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert not (folder / "out").exists()


def test_volume_picks_one_of_a_series(tiny_bundle_3d: Path, tmp_path: Path) -> None:
    """Without it the file is refused with the option's name.

    With it, the result is that of the volume alone.
    """
    import numpy as np

    series = [smooth(SMALL, seed=i) for i in range(2)]
    save(tmp_path / "in" / "series.nii.gz", nifti(np.stack(series, axis=-1)))
    save(tmp_path / "in" / "alone.nii.gz", nifti(series[1]))
    common = ("-b", tiny_bundle_3d, "--device", "cpu")
    assert (
        run(
            "segment", tmp_path / "in" / "series.nii.gz", "-o", tmp_path / "none", *common
        ).exit_code
        == 1
    )
    assert (
        run(
            "segment",
            tmp_path / "in" / "series.nii.gz",
            "-o",
            tmp_path / "one",
            *common,
            "--volume",
            1,
        ).exit_code
        == 0
    )
    assert (
        run("segment", tmp_path / "in" / "alone.nii.gz", "-o", tmp_path / "two", *common).exit_code
        == 0
    )
    ours, theirs = (
        next((tmp_path / name).glob("*.nii.gz")).read_bytes() for name in ("one", "two")
    )
    assert ours == theirs


def test_overwrite_does_cases_again(tiny_bundle_3d: Path, folder: Path) -> None:
    """Without it they are skipped."""
    common = (
        "segment",
        folder / "in",
        "-o",
        folder / "out",
        "-b",
        tiny_bundle_3d,
        "--device",
        "cpu",
    )
    for more, status in (((), "done"), ((), "skipped"), (("--overwrite",), "done")):
        lines = run(*common, *more).stderr.splitlines()[:2]
        assert sorted(line[6:] for line in lines) == [f"{status:8} a", f"{status:8} b"]


def test_overlap_is_the_one_asked_for(tiny_bundle_3d: Path, folder: Path) -> None:
    """It stands in run.json."""
    run(
        "segment",
        folder / "in",
        "-o",
        folder / "out",
        "-b",
        tiny_bundle_3d,
        "--device",
        "cpu",
        "--overlap",
        0.125,
    )
    assert json.loads((folder / "out" / "run.json").read_text())["overlap"] == "0.125"


def test_check_tells_each_check(tmp_path: Path) -> None:
    """`passed` or `failed` with the reason, a line each.

    Status 1 where one failed; the same as JSON.
    """
    root = make_bundle(tmp_path / "bundle")
    assert run("bundle", "check", root).exit_code == 0
    (root / "models" / "model.pt").unlink()
    result = run("bundle", "check", root)
    assert result.exit_code == 1
    lines = dict(line.split("  ", 1)[::-1] for line in result.stdout.splitlines())
    assert lines["spec"] == "passed"
    assert any(
        line.startswith("weights fit the spec: ") and state == "failed"
        for line, state in lines.items()
    )
    told = json.loads(run("bundle", "check", root, "--json").stdout)
    assert told["spec"] == []
    [finding] = told["weights fit the spec"]
    assert (finding["level"], finding["where"]) == ("error", "models/model.pt")
