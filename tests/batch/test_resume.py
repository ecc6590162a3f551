from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from phantom import nifti, save, smooth

from pipeline.batch.records import CaseRecord, read_record
from pipeline.batch.runner import local_executor, run_batch, segment_cases
from pipeline.inference.model import Model
from pipeline.io.cases import find_cases
from pipeline.io.tables import read_csv

SMALL = (9, 11, 8)


@pytest.fixture
def done(model_3d: Model, tmp_path: Path) -> Path:
    """A folder with the inputs a, b, c in `in` and their results in `out`."""
    for i, name in enumerate("abc"):
        save(tmp_path / "in" / f"{name}.nii.gz", nifti(smooth(SMALL, seed=i)))
    assert set(again(model_3d, tmp_path).values()) == {"done"}
    return tmp_path


def again(model: Model, folder: Path, inputs: str = "in", **options: Any) -> dict[str, str]:
    """Run once more, and return case → status, with the reason for those that were done again."""
    records: dict[str, CaseRecord] = {}

    def progress(record: CaseRecord) -> None:
        # the reason of a case that is skipped is that of the run that did it
        skipped = record.status == "skipped"
        records[record.case] = replace(record, reason="") if skipped else record

    run_batch(
        model,
        find_cases([folder / inputs], model.spec),
        folder / "out",
        local_executor,
        progress=progress,
        **options,
    )
    return {
        name: ": ".join(filter(None, (record.status, record.reason)))
        for name, record in records.items()
    }


def keep_time(path: Path, content: bytes) -> None:
    """Replace the content of a file, and restore its time of modification."""
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def labels_of(folder: Path, name: str) -> bytes:
    return (folder / "out" / f"{name}_seg.nii.gz").read_bytes()


def test_a_touched_file_is_the_same_file(model_3d: Model, done: Path) -> None:
    """Input or output, also one that was copied with a new time."""
    for path in [done / "in" / "a.nii.gz", done / "out" / "b_seg.nii.gz"]:
        os.utime(path, (1e9, 1e9))
    assert again(model_3d, done) == dict.fromkeys("abc", "skipped")


def test_moved_inputs_are_the_same(model_3d: Model, done: Path) -> None:
    """The bytes count, not the folder that they lie in."""
    shutil.move(done / "in", done / "moved")
    assert again(model_3d, done, "moved") == dict.fromkeys("abc", "skipped")


@pytest.mark.parametrize("place", ["in/a.nii.gz", "out/a_seg.nii.gz"])
def test_changed_bytes_with_size_and_time_kept_are_found_by_hash(
    place: str, model_3d: Model, done: Path
) -> None:
    """With `check_hashes`, and without it they are taken as unchanged, as documented."""
    path = done / place
    before = labels_of(done, "a")
    if place.startswith("in"):
        plain = nib.load(path)
        save(done / "in" / "a.nii.gz", nifti(np.asarray(plain.dataobj)[::-1].copy()))
        content = path.read_bytes()
        path.write_bytes(before)  # any size; below both are made equal
        record = read_record(next(iter((done / "out/.volseg/records").glob("ca/*.json"))))
        assert record is not None
        size = record.inputs[0].size
        # gzip allows what follows the end of its data to be cut or zeros to be added
        path.write_bytes(content[:size].ljust(size, b"\0"))
        os.utime(path, ns=(record.inputs[0].mtime_ns,) * 2)
    else:
        keep_time(path, before[:-1] + bytes([before[-1] ^ 1]))
    assert again(model_3d, done) == dict.fromkeys("abc", "skipped")
    states = again(model_3d, done, check_hashes=True)
    assert "another content of the same size" in states["a"]
    assert states["b"] == states["c"] == "skipped"


def test_a_changed_input_is_done_again(model_3d: Model, done: Path) -> None:
    """The table and the map are those of the new input, and the row has the reason."""
    before = labels_of(done, "a")
    save(done / "in" / "a.nii.gz", nifti(smooth((10, 11, 8), seed=9)))
    states = again(model_3d, done)
    assert states["a"].startswith(f"done: its input {done}/in/a.nii.gz has changed: ")
    assert labels_of(done, "a") != before
    assert nib.load(done / "out" / "a_seg.nii.gz").shape == (10, 11, 8)
    rows = read_csv(done / "out" / "cases.csv")
    assert "has changed" in rows[0]["reason"]
    assert rows[1]["reason"] == ""


def test_an_input_that_is_garbage_now_has_no_result(model_3d: Model, done: Path) -> None:
    """Its earlier map is gone, the others stay; when it is good again it is done again."""
    good = (done / "in" / "a.nii.gz").read_bytes()
    before = labels_of(done, "a")
    (done / "in" / "a.nii.gz").write_bytes(b"garbage")
    assert again(model_3d, done)["a"].startswith("failed: its input")
    assert not (done / "out" / "a_seg.nii.gz").exists()
    assert [row["status"] for row in read_csv(done / "out" / "cases.csv")] == [
        "failed",
        "done",
        "done",
    ]
    (done / "in" / "a.nii.gz").write_bytes(good)
    assert again(model_3d, done)["a"] == "done: it failed before"
    assert labels_of(done, "a") == before


DAMAGES = ["truncated", "cut in the header", "emptied", "edited", "garbage", "deleted"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_output_is_made_again(damage: str, model_3d: Model, done: Path) -> None:
    """With the same bytes as before, and the reason."""
    path = done / "out" / "b_seg.nii.gz"
    whole = path.read_bytes()
    if damage == "edited":
        image = nib.load(path)
        labels = np.asarray(image.dataobj).copy()
        labels[2:5] = 7
        nib.save(nib.Nifti1Image(labels, image.affine, image.header), path)
    elif damage == "deleted":
        path.unlink()
    else:
        cuts = {"truncated": whole[:-9], "cut in the header": whole[:40], "emptied": b""}
        path.write_bytes(cuts.get(damage, b"garbage"))
    states = again(model_3d, done)
    assert states["b"].startswith("done: its output b_seg.nii.gz ")
    assert states["a"] == "skipped"
    assert path.read_bytes() == whole


def test_an_image_that_somebody_put_in_place_of_an_output_stays(
    model_3d: Model, done: Path
) -> None:
    """The row names it; it is neither replaced nor removed, until `overwrite`."""
    path = save(done / "out" / "b_seg.nii.gz")
    mine = path.read_bytes()
    for _ in range(2):
        states = again(model_3d, done)
        assert states["b"].startswith("failed")
        assert path.read_bytes() == mine
    assert "move it away" in read_csv(done / "out" / "cases.csv")[1]["message"]
    assert again(model_3d, done, overwrite=True)["b"].startswith("done")
    assert path.read_bytes() != mine


def test_an_input_with_problem_now_loses_its_result(model_3d: Model, done: Path) -> None:
    """As a link that leads nowhere."""
    (done / "in" / "a.nii.gz").unlink()
    (done / "in" / "a.nii.gz").symlink_to(done / "nowhere.nii.gz")
    assert again(model_3d, done)["a"].startswith("failed: its input cannot be used any more")
    assert not (done / "out" / "a_seg.nii.gz").exists()


def test_another_folder_with_the_same_names_replaces_the_results(
    model_3d: Model, done: Path
) -> None:
    """Rows and maps are those of the second folder, with the reason."""
    for i, name in enumerate("ab"):
        save(done / "other" / f"{name}.nii.gz", nifti(smooth(SMALL, seed=20 + i)))
    segment_cases(model_3d, find_cases([done / "other"], model_3d.spec), done / "expected")
    states = again(model_3d, done, "other")
    assert states["a"] == (
        f"done: its input was {done}/in/a.nii.gz, and is {done}/other/a.nii.gz now"
    )
    for name in "ab":
        expected = (done / "expected" / f"{name}_seg.nii.gz").read_bytes()
        assert labels_of(done, name) == expected
    rows = read_csv(done / "out" / "cases.csv")
    assert [row["input"] for row in rows] == [
        f"{done}/other/a.nii.gz",
        f"{done}/other/b.nii.gz",
        f"{done}/in/c.nii.gz",
    ]
    expected_rows = read_csv(done / "expected" / "volumes.csv")
    assert read_csv(done / "out" / "volumes.csv")[:2] == expected_rows


def test_both_files_of_a_pair_count(model_3d: Model, tmp_path: Path) -> None:
    """A changed .img is a changed input, although the .hdr is the same."""
    (tmp_path / "in").mkdir()
    image = nib.Nifti1Pair(smooth(SMALL), nifti().affine)
    nib.save(image, tmp_path / "in" / "a.hdr")
    assert again(model_3d, tmp_path) == {"a": "done"}
    assert again(model_3d, tmp_path) == {"a": "skipped"}
    voxels = tmp_path / "in" / "a.img"
    voxels.write_bytes(voxels.read_bytes()[::-1][:-8] + b"\0" * 8)
    assert again(model_3d, tmp_path)["a"].startswith(f"done: its input {voxels} has changed")


def test_images_in_memory_are_always_done_again(model_3d: Model, tmp_path: Path) -> None:
    """Nothing says whether they are the same."""
    for seed in (1, 2):
        image = nifti(smooth(SMALL, seed=seed))
        (record,) = segment_cases(model_3d, [{"case": "a", "image": image}], tmp_path / "out")
        assert record.status == "done"
        (alone,) = segment_cases(model_3d, [{"case": "a", "image": image}], tmp_path / f"{seed}")
        assert alone.volumes_mm3 == record.volumes_mm3


def test_a_lost_record_is_no_loss(model_3d: Model, done: Path) -> None:
    """The case is done again, with the same bytes; a damaged record is named as the reason."""
    before = {name: labels_of(done, name) for name in "abc"}
    paths = sorted((done / "out" / ".volseg" / "records").glob("*/*.json"))
    names = {read.case: path for path in paths if (read := read_record(path))}
    names["a"].unlink()
    names["b"].write_bytes(b'{"case": "b", ')
    states = again(model_3d, done)
    assert states == {"a": "done", "b": "done: its record was damaged", "c": "skipped"}
    assert {name: labels_of(done, name) for name in "abc"} == before


def test_times_in_the_future_do_not_matter(model_3d: Model, done: Path) -> None:
    """As after a clock that was set back: records, outputs and inputs are newer than now."""
    for path in (done / "out").rglob("*"):
        os.utime(path, (4e9, 4e9))
    assert again(model_3d, done) == dict.fromkeys("abc", "skipped")
    (done / "out" / "b_seg.nii.gz").unlink()
    assert again(model_3d, done)["b"].startswith("done: its output")
    assert len(read_csv(done / "out" / "cases.csv")) == 3
