from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest
from batch_folders import record_of, store
from phantom import nifti, save, smooth

from pipeline.batch import identity
from pipeline.batch.identity import (
    has_label_table,
    results_identity,
    settle_identity,
    settle_runtime,
)
from pipeline.batch.outputs import OutputFolder
from pipeline.batch.records import read_record, write_record
from pipeline.batch.runner import local_executor, run_batch
from pipeline.bundle.opening import open_bundle
from pipeline.errors import ConfigError
from pipeline.inference.model import Model
from pipeline.io.cases import find_cases
from pipeline.io.tables import read_csv

SMALL = (9, 11, 8)


def test_the_first_process_decides(model_3d: Model, tmp_path: Path) -> None:
    """Of several at the same moment, all get the same identity, and nothing is left over."""
    out = OutputFolder.create(tmp_path / "out")
    found: list[dict[str, str]] = []
    together = threading.Barrier(8)

    def settle() -> None:
        together.wait()
        found.append(settle_identity(out, model_3d, overwrite=False))

    threads = [threading.Thread(target=settle) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [results_identity(model_3d) | {"label_table": "True"}] * 8
    assert not list(out.staging.iterdir())


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b'{"bundle": "x"}'])
def test_a_damaged_identity_is_no_identity(content: bytes, model_3d: Model, tmp_path: Path) -> None:
    """The results may be anybody's; --overwrite removes them."""
    out = store(tmp_path / "out", record_of("a"))
    out.identity.write_bytes(content)
    with pytest.raises(ConfigError, match="--overwrite"):
        settle_identity(out, model_3d, overwrite=False)
    settled = settle_identity(out, model_3d, overwrite=True)
    assert settled == results_identity(model_3d) | {"label_table": "True"}
    assert read_record(out.record("a")) is None


def test_shards_that_overwrite_do_not_remove_each_others_results(
    model_3d: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one to come finds the folder settled, however late the first one is."""
    out = store(tmp_path / "out", record_of("old"))
    out.identity.write_text("{}")
    original = identity._remove_results

    def slowly(folder: OutputFolder) -> None:
        time.sleep(0.5)
        original(folder)

    monkeypatch.setattr(identity, "_remove_results", slowly)

    def shard(name: str) -> None:
        settle_identity(out, model_3d, overwrite=True)
        write_record(out, record_of(name))

    threads = [threading.Thread(target=shard, args=(name,)) for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_record(out.record("old")) is None
    assert [read_record(out.record(name)) is not None for name in "abc"] == [True] * 3


def run(bundle: Path, folder: Path, names: str, *, overwrite: bool = False, **how: Any) -> Model:
    model = open_bundle(bundle, device="cpu", **how)
    cases = find_cases([folder / "in" / f"{name}.nii.gz" for name in names], model.spec)
    run_batch(model, cases, folder / "out", local_executor, overwrite=overwrite)
    return model


def test_a_folder_has_one_runtime(tiny_bundle_3d: Path, tmp_path: Path) -> None:
    """Another one is refused; with --overwrite its results take the place of all others."""
    for i, name in enumerate("ab"):
        save(tmp_path / "in" / f"{name}.nii.gz", nifti(smooth(SMALL, seed=i)))
    run(tiny_bundle_3d, tmp_path, "ab", runtime="openvino")
    with pytest.raises(ConfigError, match="computed by openvino in float32, --runtime torch was"):
        run(tiny_bundle_3d, tmp_path, "a", runtime="torch")
    run(tiny_bundle_3d, tmp_path, "a", runtime="torch", overwrite=True)
    assert [row["case"] for row in read_csv(tmp_path / "out" / "cases.csv")] == ["a"]
    assert not (tmp_path / "out" / "b_seg.nii.gz").exists()
    auto = run(tiny_bundle_3d, tmp_path, "b")  # follows what was decided
    out = OutputFolder.create(tmp_path / "out")
    described = settle_runtime(out, auto)
    assert described is not None
    assert described["runtime"] == "torch"


def codes(path: Path) -> list[int]:
    """Return the codes of the extensions of a NIfTI file."""
    return list(nib.load(path).header.extensions.get_codes())


@pytest.mark.slow
def test_label_tables_are_a_choice_of_the_folder(model_3d: Model, tmp_path: Path) -> None:
    """Later runs follow it without asking; asking for the other one is refused, never mixed."""
    for name in ("a", "b", "c"):
        save(tmp_path / f"{name}.nii.gz", nifti(smooth(SMALL)))
    out = tmp_path / "out"

    def run(name: str, **options: Any) -> None:
        cases = find_cases([str(tmp_path / f"{name}.nii.gz")], model_3d.spec)
        run_batch(model_3d, cases, out, local_executor, **options)

    run("a", label_table=False)
    with pytest.raises(ConfigError, match="label_table False, now True"):
        run("b", label_table=True)
    run("b")
    assert codes(out / "a_seg.nii.gz") == codes(out / "b_seg.nii.gz") == []
    run("a", label_table=True, overwrite=True)
    assert codes(out / "a_seg.nii.gz") == [30]
    assert not (out / "b_seg.nii.gz").exists()
    run("c")
    assert codes(out / "c_seg.nii.gz") == [30]
    plain = nib.load(out / "c_seg.nii.gz").header
    assert plain.get_intent()[0] == "label"


def test_results_of_earlier_versions_stay_without_tables(model_3d: Model, tmp_path: Path) -> None:
    """Their identity does not name the choice; a run that does not ask changes nothing in it."""
    out = store(tmp_path / "out", record_of("a"))
    before = results_identity(model_3d)
    out.identity.write_text(json.dumps(before))
    for choice in (None, False):
        settled = settle_identity(out, model_3d, overwrite=False, label_table=choice)
        assert settled == before
        assert not has_label_table(settled)
    with pytest.raises(ConfigError, match="label_table"):
        settle_identity(out, model_3d, overwrite=False, label_table=True)
    assert settle_identity(out, model_3d, overwrite=True) == before
    assert read_record(out.record("a")) is not None
