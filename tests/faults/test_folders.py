from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from command import Volseg
from injected import WhileReading
from phantom import make_bundle, nifti, oblique, save, smooth

from pipeline.io.tables import read_csv

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs fork"),
]
SMALL = (9, 11, 8)
ALL = "abcdef"


@pytest.fixture
def common(tiny_bundle_3d: Path) -> list[Any]:
    """The arguments without inputs."""
    return ["-b", tiny_bundle_3d, "--device", "cpu"]


def statuses(out: Path) -> dict[str, str]:
    return {row["case"]: row["status"] for row in read_csv(out / "cases.csv")}


def maps(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*_seg.nii.gz")
    }


def test_processes_with_other_inputs_share_a_folder(
    volseg: Volseg, common: list[Any], folder: Path, expected: Path
) -> None:
    """Three at the same time: all rows, and the tables of an undisturbed run."""
    slow = WhileReading((), "sleep", 0.2)
    running = [
        volseg.start(
            "segment", folder / "in", "-o", folder / "out", *common, "--shard", f"{k}/3", fault=slow
        )
        for k in (1, 2, 3)
    ]
    assert [one.wait() for one in running] == [0, 0, 0]
    assert statuses(folder / "out") == dict.fromkeys(ALL, "done")
    assert maps(folder / "out") == maps(expected)
    assert (folder / "out/volumes.csv").read_bytes() == (expected / "volumes.csv").read_bytes()


def test_processes_with_the_same_inputs_share_the_work(
    volseg: Volseg, common: list[Any], folder: Path, expected: Path
) -> None:
    """Each case is done once; both have all cases and end well."""
    slow = WhileReading((), "sleep", 0.3)
    running = [
        volseg.start("segment", folder / "in", "-o", folder / "out", *common, fault=slow)
        for _ in range(2)
    ]
    assert [one.wait() for one in running] == [0, 0]
    lines = [line.split() for line in (folder / "out" / "volseg.log").read_text().splitlines()]
    assert sorted(words[4] for words in lines if words[3] == "done") == list(ALL)
    assert all("6 of 6 cases are in" in one.text for one in running)
    assert maps(folder / "out") == maps(expected)


def test_results_of_other_settings_are_not_mixed(
    volseg: Volseg, common: list[Any], folder: Path
) -> None:
    """Another overlap, bundle or voxel size is refused; with --overwrite nothing stale stays."""
    out = folder / "out"
    assert volseg("segment", folder / "in", "-o", out, *common)[0] == 0
    before = maps(out)
    other = make_bundle(folder / "other", seed=3)
    few = [folder / "in" / "a.nii.gz", folder / "in" / "b.nii.gz"]
    for more in (["--overlap", 0.1], ["-b", other], ["--labels-spacing", 2]):
        status, text = volseg("segment", *few, "-o", out, *common, *more)
        assert status == 2, text
        assert "holds results of another model or setting" in text
        assert maps(out) == before
    assert volseg("segment", *few, "-o", out, *common, "-b", other, "--overwrite")[0] == 0
    assert statuses(out) == dict.fromkeys("ab", "done")
    assert set(maps(out)) == {"a_seg.nii.gz", "b_seg.nii.gz"}
    assert maps(out)["a_seg.nii.gz"] != before["a_seg.nii.gz"]
    assert len(read_csv(out / "volumes.csv")) == 2


def test_a_bad_case_that_is_overwritten_has_no_map(
    volseg: Volseg, common: list[Any], folder: Path
) -> None:
    """Its earlier map would look like its result."""
    assert volseg("segment", folder / "in", "-o", folder / "out", *common)[0] == 0
    (folder / "in" / "b.nii.gz").write_bytes(b"bad")
    status, _ = volseg("segment", folder / "in", "-o", folder / "out", *common, "--overwrite")
    assert status == 1
    assert statuses(folder / "out") == dict.fromkeys("acdef", "done") | {"b": "failed"}
    assert set(maps(folder / "out")) == {f"{name}_seg.nii.gz" for name in "acdef"}


def test_tables_and_records_that_somebody_removes(
    volseg: Volseg, common: list[Any], folder: Path, expected: Path
) -> None:
    """Tables are derived again; without records, what is there is not taken for results."""
    out = folder / "out"
    run = ["segment", folder / "in", "-o", out, *common]
    assert volseg(*run)[0] == 0
    for name in ("cases.csv", "volumes.csv", "run.json"):
        for content in (None, b"\xef\xbb\xbf", b"edited"):
            path = out / name
            path.unlink() if content is None else path.write_bytes(content)
            assert volseg("tables", out)[0] == 0
    assert volseg(*run)[0] == 0
    assert (out / "volumes.csv").read_bytes() == (expected / "volumes.csv").read_bytes()
    shutil.rmtree(out / ".volseg")
    status, text = volseg(*run)
    assert status == 2
    assert "--overwrite" in text
    status, text = volseg(*run, "--overwrite")
    assert status == 0, text
    assert maps(out) == maps(expected)
    shutil.rmtree(out / ".volseg")
    (out / "run.json").unlink()
    status, text = volseg(*run)
    assert status == 0, text
    assert statuses(out) == dict.fromkeys(ALL, "done")


def test_links_and_odd_names_have_rows(volseg: Volseg, common: list[Any], tmp_path: Path) -> None:
    """What cannot be used fails by itself, and nothing is lost."""
    into = tmp_path / "in"
    image = nifti(smooth(SMALL))
    elsewhere = save(tmp_path / "elsewhere" / "linked.nii.gz", image)
    good = ["a b", "ö é ✓", "new\nline", "sub dir/x", "y" * 200]
    for name in good:
        save(into / f"{name}.nii.gz", image)
    shutil.copy(elsewhere, into / os.fsdecode(b"\xfcber.nii.gz"))
    (into / "folder").symlink_to(elsewhere.parent)
    (into / "file.nii.gz").symlink_to(elsewhere)
    (into / "dangling.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    (into / "loop").symlink_to(into)
    (into / "self").symlink_to(into / "self")
    (into / ("z" * 243 + ".nii.gz")).symlink_to(elsewhere)
    os.mkfifo(into / "fifo.nii.gz")
    status, text = volseg("segment", into, "-o", tmp_path / "out", *common)
    assert status == 1, text
    found = statuses(tmp_path / "out")
    done = {name for name, status in found.items() if status == "done"}
    names = {name.replace("\n", "\\n") for name in good}
    assert done == names | {"\\xfcber", "folder/linked", "file"}
    assert set(found) - done == {"dangling", "loop", "self", "fifo", "z" * 243}
    assert Path(os.fsdecode(os.fsencode(tmp_path) + b"/out/\xfcber_seg.nii.gz")).exists()
    messages = {row["case"]: row["message"] for row in read_csv(tmp_path / "out" / "cases.csv")}
    assert "was the data fetched" in messages["dangling"]
    assert "leads back to a folder that contains it" in messages["loop"]
    assert "bytes, at most " in messages["z" * 243]
    status, text = volseg("segment", into, "-o", tmp_path / "out", *common)
    assert status == 1
    assert f"{len(done)} of them from an earlier run" in text


def test_nothing_is_written_outside(volseg: Volseg, common: list[Any], tmp_path: Path) -> None:
    """By patterns, names of cases, or links below the output folder."""
    image = nifti(smooth(SMALL))
    save(tmp_path / "in" / "sub" / "a.nii.gz", image)
    save(tmp_path / "x" / "b.nii.gz", image)
    out = tmp_path / "deep" / "out"
    before = sorted(tmp_path.rglob("*"))
    status, text = volseg("segment", f"{tmp_path}/*/../../x/*.nii.gz", "-o", out, *common)
    assert status == 2
    assert "`..` after a wildcard" in text
    table = tmp_path / "cases.csv"
    table.write_text("case,image\n../../evil,x/b.nii.gz\n/evil,x/b.nii.gz\ngood,x/b.nii.gz\n")
    status, text = volseg("segment", table, "-o", out, *common)
    assert status == 1
    assert statuses(out) == {"../../evil": "failed", "/evil": "failed", "good": "done"}
    assert "leads out of the output folder" in text
    (out / "sub").symlink_to(tmp_path / "x")
    status, text = volseg("segment", tmp_path / "in", "-o", out, *common)
    assert status == 1
    assert "a link leads out of the output folder" in text
    outside = [path for path in sorted(tmp_path.rglob("*")) if "deep" not in path.parts]
    printed = {path for path in outside if "printed" in path.parts}
    assert [path for path in outside if path not in printed] == sorted(
        [table, *(path for path in before if "printed" not in path.parts)]
    )


def test_an_output_folder_that_is_removed_ends_the_run(
    volseg: Volseg, common: list[Any], folder: Path
) -> None:
    """With that reason; it is not made again."""
    slow = WhileReading((), "sleep", 0.7)
    running = volseg.start("segment", folder / "in", "-o", folder / "out", *common, fault=slow)
    running.wait_for(lambda: "done" in running.text)
    (folder / "out").rename(folder / "moved")
    assert running.wait() == 1
    assert "the output folder was removed or replaced during the run" in running.text
    assert "Traceback" not in running.text
    assert not (folder / "out").exists()


@contextmanager
def mounted(path: Path, size: str) -> Iterator[None]:
    """Mount a small file system in memory, where that is permitted."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_stops_the_run(
    volseg: Volseg, common: list[Any], folder: Path, expected: Path
) -> None:
    """With the reason; nothing partial is left, and with more space the next run finishes it."""
    disk = folder / "disk"
    with mounted(disk, "256k"):
        run = ["segment", folder / "in", "-o", disk / "out", *common]
        # all but a little of the space is taken: room for a few records
        assert volseg("segment", folder / "in/a.nii.gz", "-o", disk / "out", *common)[0] == 0
        filler = disk / "filler"
        free = os.statvfs(disk)
        filler.write_bytes(bytes(max(0, free.f_bavail * free.f_bsize - 5 * 4096)))
        status, text = volseg(*run)
        assert status == 1, text
        assert "No space left on device" in text
        assert "cases are not done; start the same command again" in text
        assert "Traceback" not in text
        for path in disk.rglob("*_seg.nii.gz"):
            assert path.read_bytes() == (expected / path.name).read_bytes()
        assert not list(disk.rglob("*.tmp"))
        filler.unlink()
        status, text = volseg(*run)
        assert status == 0, text
        assert maps(disk / "out") == maps(expected)
        assert statuses(disk / "out") == dict.fromkeys(ALL, "done")


def test_a_folder_that_cannot_be_written_is_a_wrong_command(
    volseg: Volseg, common: list[Any], folder: Path
) -> None:
    """Whether or not it holds results."""
    disk = folder / "disk"
    with mounted(disk, "8m"):
        assert volseg("segment", folder / "in", "-o", disk / "out", *common)[0] == 0
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for name in ("out", "new"):
            status, text = volseg("segment", folder / "in", "-o", disk / name, *common)
            assert status == 2, text
            assert "Read-only file system" in text
            assert "Traceback" not in text
        status, text = volseg("tables", disk / "out")
        assert status == 2, text
        assert "Traceback" not in text


def broken(folder: Path) -> list[str]:
    """Write twelve files that cannot be segmented, each in its own way, and return their names."""
    good = save(folder / "good.nii.gz", nifti(smooth((30, 31, 32), seed=4)))
    whole = good.read_bytes()
    good.unlink()
    nan = np.full(SMALL, np.nan, np.float32)
    images: dict[str, Any] = {
        "nan": nifti(nan),
        "series": nifti(smooth((*SMALL, 3))),
        "colour": nib.Nifti1Image(
            np.zeros(SMALL, [("R", "u1"), ("G", "u1"), ("B", "u1")]), oblique()
        ),
        "constant": nifti(np.ones(SMALL, np.float32)),
        "flat": nifti(smooth((9, 11, 1))[..., 0]),
        "coarse": nifti(smooth(SMALL), oblique((900.0, 1.3, 2.1))),
    }
    contents = {
        "empty": b"",
        "text": b"no image at all",
        "cut": whole[:-2000],
        "cut_header": whole[:50],
        "checksum": whole[:-8] + bytes(byte ^ 255 for byte in whole[-8:-4]) + whole[-4:],
        "zeros": bytes(2000),
    }
    for name, image in images.items():
        save(folder / f"{name}.nii.gz", image)
    for name, content in contents.items():
        (folder / f"{name}.nii.gz").write_bytes(content)
    return [*images, *contents]


@pytest.mark.parametrize(
    "how", ["jobs", *(pytest.param(how, marks=pytest.mark.stress) for how in ("one", "shards"))]
)
def test_broken_files_fail_alone(
    how: str, volseg: Volseg, common: list[Any], folder: Path, expected: Path
) -> None:
    """Twelve kinds; the good ones have the bytes that they have without them."""
    names = broken(folder / "in")
    run = ["segment", folder / "in", "-o", folder / "out", *common]
    options = {"one": [["--jobs", 1]], "jobs": [["--jobs", 2]]}
    options["shards"] = [["--shard", f"{k}/3"] for k in (1, 2, 3)]
    running = [volseg.start(*run, *more) for more in options[how]]
    assert {one.wait() for one in running} == {1}, [one.text for one in running]
    found = statuses(folder / "out")
    assert found == dict.fromkeys(ALL, "done") | dict.fromkeys(names, "failed")
    assert maps(folder / "out") == maps(expected)
    rows = {row["case"]: row for row in read_csv(folder / "out" / "cases.csv")}
    for name in names:
        assert f"{name}.nii.gz" in rows[name]["message"]
        assert "a bug of volseg" not in rows[name]["message"]
    assert "Traceback" not in "".join(one.text for one in running)


def test_a_wrong_number_of_channels_fails_alone(volseg: Volseg, folder: Path) -> None:
    """A case without one of its channels is a row; the others are done."""
    bundle = make_bundle(folder / "two", channels=["T1w", "FLAIR"])
    for i, name in enumerate(["a_T1w", "a_FLAIR", "b_T1w", "c_0000", "c_0001", "d"]):
        save(folder / "pairs" / f"{name}.nii.gz", nifti(smooth(SMALL, seed=i)))
    save(folder / "pairs" / "e_T1w.nii.gz", nifti(smooth(SMALL)))
    save(folder / "pairs" / "e_FLAIR.nii.gz", nifti(smooth((10, 11, 8))))
    status, text = volseg(
        "segment", folder / "pairs", "-o", folder / "out", "-b", bundle, "--device", "cpu"
    )
    assert status == 1, text
    assert statuses(folder / "out") == {
        "a": "done",
        "b": "failed",
        "c": "done",
        "d": "failed",
        "e": "failed",
    }


def test_an_empty_shard_is_no_error(volseg: Volseg, common: list[Any], folder: Path) -> None:
    """There are more tasks than cases; the same for --dry-run."""
    run = ["segment", folder / "in", "-o", folder / "out", *common, "--shard", "7/9"]
    status, text = volseg(*run)
    assert status == 0, text
    assert "0 of 0 cases" in text
    status, text = volseg(*run, "--dry-run")
    assert status == 0, text
    assert "Traceback" not in text


def test_the_real_command_does_the_same(
    common: list[Any], folder: Path, expected: Path, tmp_path: Path
) -> None:
    """As a shell calls it, with all its imports."""
    command = [Path(sys.executable).with_name("volseg"), "segment", folder / "in"]
    command += ["-o", folder / "out", *common, "--jobs", "2"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert maps(folder / "out") == maps(expected)
    assert done.stderr.splitlines()[-1] == f"6 of 6 cases are in {folder / 'out'}"
