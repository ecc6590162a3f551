from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from batch_folders import record_of, store
from click.testing import CliRunner

from pipeline.batch.outputs import OutputFolder
from pipeline.batch.records import state_of, write_record
from pipeline.batch.statistics import asymmetry_index, write_statistics
from pipeline.batch.tables import write_tables
from pipeline.cli import main
from pipeline.config.spec import load_spec, spec_fingerprint
from pipeline.errors import ConfigError
from pipeline.io.label_files import LABEL_FILES
from pipeline.io.tables import write_json

ROOT = Path(__file__).parents[2]
SPEC = load_spec(ROOT / "bundles/brain_mr_structures/configs/spec.yaml")


def brain_volumes() -> dict[str, float]:
    """Return a volume for each structure and sum, all of them different."""
    volumes = {name: 100.25 + 7 * value for name, value in SPEC.labels.items() if value}
    return volumes | {"brain": 5000.5, "ventricles": 700.0, "intracranial": 8000.0}


def brain_folder(folder: Path) -> OutputFolder:
    """Return an output folder with two cases of the brain model and one that failed."""
    out = store(folder)
    write_json(out.labels, SPEC.labels)
    labels = np.resize(np.array(list(SPEC.labels.values()), dtype=np.uint8), (5, 7, 9))
    for name in ("b", "sub-01/anat/a"):
        path = out.root / f"{name}_seg.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(labels, np.diag([0.5, 2.0, 3.0, 1.0])), path)
        record = record_of(
            name,
            volumes_mm3=brain_volumes(),
            outputs=(state_of(path, f"{name}_seg.nii.gz"),),
            columns={"age": "7"},
        )
        write_record(out, record)
    write_record(out, record_of("c", status="failed", error="no", volumes_mm3={}))
    return out


def table2(path: Path) -> dict[str, float]:
    """Return what FreeSurfer's asegstats2table takes from a file: rows, then known measures."""
    found, measures = {}, {}
    for line in path.read_text().splitlines():
        if line.rfind("#") == -1:
            words = line.split()
            int(words[2])
            found[words[4]] = float(words[3])
        elif line.startswith("# Measure "):
            names = line.removeprefix("# Measure ").split(", ")
            measures[names[1]] = float(line.split(",")[3])
    return found | measures


def test_the_asymmetry_index() -> None:
    """Odd, between -1 and 1, above 0 where left is larger, nothing of nothing."""
    assert asymmetry_index(3.0, 1.0) == 0.5
    assert asymmetry_index(1.0, 3.0) == -0.5
    assert (asymmetry_index(2.0, 0.0), asymmetry_index(0.0, 2.0)) == (1.0, -1.0)
    assert asymmetry_index(2.0, 2.0) == 0
    assert asymmetry_index(0.0, 0.0) is None


def test_tables_of_statistics(tmp_path: Path) -> None:
    """By pandas: the same cases, mL, fractions and indices of what volumes.csv holds."""
    out = brain_folder(tmp_path / "out")
    write_tables(out.root)
    before = (out.root / "volumes.csv").read_bytes()
    write_statistics(out.root)
    assert (out.root / "volumes.csv").read_bytes() == before
    volumes = pd.read_csv(out.root / "volumes.csv", index_col="case")
    names = [name for name in volumes.columns if name != "age"]
    ml = pd.read_csv(out.root / "volumes_ml.csv", index_col="case")
    assert list(ml.columns) == list(volumes.columns)
    assert np.allclose(ml[names] * 1000, volumes[names])
    icv = pd.read_csv(out.root / "volumes_icv.csv", index_col="case")
    assert (icv["intracranial_mm3"] == 8000).all()
    parts = [name for name in names if name != "intracranial"]
    assert np.allclose(icv[parts], volumes[parts] / 8000, rtol=1e-5)
    sides = pd.read_csv(out.root / "asymmetry.csv", index_col="case")
    assert len(sides.columns) == 14 + 1
    left, right = volumes["left hippocampus"], volumes["right hippocampus"]
    assert np.allclose(sides["hippocampus"], (left - right) / (left + right), atol=1e-6)
    assert list(ml.index) == list(icv.index) == list(sides.index) == ["b", "sub-01/anat/a"]
    assert (ml["age"] == 7).all()


def test_the_long_form(tmp_path: Path) -> None:
    """A row per case and volume, with value and side where there is one."""
    out = brain_folder(tmp_path / "out")
    write_statistics(out.root, ["long"])
    rows = pd.read_csv(out.root / "volumes_long.tsv", sep="\t")
    assert list(rows.columns) == [
        "case", "structure", "label", "side", "volume_mm3", "icv_fraction", "age",
    ]  # fmt: skip
    assert len(rows) == 2 * len(brain_volumes())
    wide = rows.pivot_table(index="case", columns="structure", values="volume_mm3")
    assert wide.loc["b"].to_dict() == brain_volumes()
    first = rows.set_index(["case", "structure"]).loc[("b", "right pallidum")]
    assert (first["label"], first["side"]) == (52, "right")
    assert rows[rows["structure"] == "brain"][["label", "side"]].isna().all(axis=None)
    assert np.allclose(rows["icv_fraction"], rows["volume_mm3"] / 8000, rtol=1e-5)


def test_aseg_stats_is_read_by_freesurfers_rules(tmp_path: Path) -> None:
    """Names, volumes, voxels and measures; the folder is a SUBJECTS_DIR."""
    out = brain_folder(tmp_path / "out")
    write_statistics(out.root, ["aseg"])
    folder = out.root / "freesurfer"
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.stats")) == [
        "b/stats/aseg.stats", "sub-01/anat/a/stats/aseg.stats",
    ]  # fmt: skip
    path = folder / "b/stats/aseg.stats"
    found, volumes = table2(path), brain_volumes()
    assert found["Left-Hippocampus"] == pytest.approx(volumes["left hippocampus"], abs=0.06)
    assert found["eTIV"] == 8000
    cortex = volumes["left cerebral cortex"] + volumes["right cerebral cortex"]
    assert found["CortexVol"] == pytest.approx(cortex)
    assert found["rhCerebralWhiteMatterVol"] == volumes["right cerebral white matter"]
    rows = [line.split() for line in path.read_text().splitlines() if "#" not in line]
    assert [int(row[0]) for row in rows] == list(range(1, 33))
    assert [int(row[1]) for row in rows] == sorted(set(SPEC.labels.values()) - {0})
    labels = np.asarray(nib.load(out.root / "b_seg.nii.gz").dataobj)
    assert all(int(row[2]) == (labels == int(row[1])).sum() for row in rows)
    text = path.read_text()
    assert "# VoxelVolume_mm3 3\n" in text
    assert "# NRows 32\n# NTableCols 5\n# ColHeaders  Index SegId NVoxels Volume_mm3 Str" in text


def test_names_of_other_labels_are_words(tmp_path: Path) -> None:
    """Spaces and `#` would end a row."""
    out = store(tmp_path / "out")
    write_json(out.labels, {"background": 0, "lesion #1 of  two": 3})
    path = out.root / "x_seg.nii.gz"
    nib.save(nib.Nifti1Image(np.full((3, 4, 5), 3, np.uint8), np.eye(4)), path)
    state = state_of(path, path.name)
    write_record(out, record_of("x", volumes_mm3={"lesion #1 of  two": 60.0}, outputs=(state,)))
    write_statistics(out.root, ["aseg"])
    assert table2(out.root / "freesurfer/x/stats/aseg.stats") == {"lesion-1-of-two": 60.0}


def warnings_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def test_what_has_no_content_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model without an intracranial volume, sides or known labels still gets the others."""
    out = store(tmp_path / "out", record_of("a"), record_of("b", volumes_mm3={"front": 0.0}))
    written = write_statistics(out.root)
    assert [path.name for path in written] == ["volumes_ml.csv", "volumes_long.tsv"]
    text = warnings_of(caplog)
    assert "no volumes_icv.csv: no case has a volume 'intracranial'; --icv takes a column" in text
    assert "no asymmetry.csv: no structure has a left and a right side" in text
    assert "values of the labels are not known" in text
    assert write_statistics(out.root, ["icv"], icv="front") == [out.root / "volumes_icv.csv"]
    rows = pd.read_csv(out.root / "volumes_icv.csv", index_col="case")
    assert rows["front_mm3"].to_list() == [12.5, 0.0]


def test_a_label_map_that_is_gone_costs_its_case_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And the file of a case that failed later does not stay."""
    out = brain_folder(tmp_path / "out")
    write_statistics(out.root, ["aseg"])
    (out.root / "b_seg.nii.gz").unlink()
    stale = out.root / "freesurfer/c/stats/aseg.stats"
    stale.parent.mkdir(parents=True)
    stale.write_text("old")
    write_statistics(out.root, ["aseg"])
    assert "b: no aseg.stats" in warnings_of(caplog)
    assert not stale.exists()
    assert not (out.root / "freesurfer/b/stats/aseg.stats").exists()
    assert (out.root / "freesurfer/sub-01/anat/a/stats/aseg.stats").exists()


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no output folder of volseg"):
        write_statistics(tmp_path)


def test_label_files_come_with_the_tables(tmp_path: Path) -> None:
    """Once they are known; a damaged one is written again, and nothing else is left."""
    out = brain_folder(tmp_path / "out")
    write_tables(out.root)
    before = {name: (out.root / name).read_bytes() for name in LABEL_FILES}
    (out.root / LABEL_FILES[0]).write_text("x")
    (out.root / LABEL_FILES[1]).unlink()
    write_tables(out.root)
    assert before == {name: (out.root / name).read_bytes() for name in LABEL_FILES}
    assert not list(out.staging.iterdir())
    unknown = store(tmp_path / "unknown", record_of("a"))
    write_tables(unknown.root)
    assert not any((unknown.root / name).exists() for name in LABEL_FILES)


def test_folders_of_earlier_versions_have_the_labels_of_their_bundle(tmp_path: Path) -> None:
    """By the name of a shipped bundle and the hash of its spec; of others nothing is known."""
    for name, spec_hash, known in (("old", spec_fingerprint(SPEC), True), ("other", "0", False)):
        out = store(tmp_path / name, record_of("a"))
        write_json(out.identity, {"bundle": "brain_mr_structures", "spec_sha256": spec_hash})
        write_tables(out.root)
        assert (out.root / LABEL_FILES[0]).exists() == known


def test_the_command(tmp_path: Path) -> None:
    """Kinds may be given together; an unknown one is status 2, and writes nothing."""
    out = brain_folder(tmp_path / "out")
    command = ["tables", str(out.root), "--stats"]
    wrong = CliRunner().invoke(main, [*command, "litres"])
    assert wrong.exit_code == 2
    assert "'litres' is not one of 'ml', 'icv', 'asymmetry', 'long', 'aseg', 'all'" in wrong.stderr
    assert not (out.root / "volumes.csv").exists()
    result = CliRunner().invoke(main, [*command, "ml", "--stats", "icv", "--icv", "brain"])
    assert result.exit_code == 0
    assert "wrote" in result.stderr
    made = {path.name for path in out.root.iterdir()}
    assert made >= {"volumes_ml.csv", "volumes_icv.csv", "labels.tsv"}
    assert not made & {"asymmetry.csv", "volumes_long.tsv", "freesurfer"}
    rows = pd.read_csv(out.root / "volumes_icv.csv", index_col="case")
    assert (rows["brain_mm3"] == 5000.5).all()
