"""What lies beside label maps of BIDS, derived from records; no image is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from batch_folders import record_of, store

from pipeline.batch.bids_derivatives import (
    BidsDerivatives,
    _container,
    check_derivatives_folder,
    remove_orphans,
)
from pipeline.batch.outputs import OutputFolder
from pipeline.batch.records import CaseRecord
from pipeline.errors import ConfigError

STEM = "sub-01/ses-1/anat/sub-01_ses-1"
LABELS = {"background": 0, "front": 7, "back": 300}


def record(case: str = f"{STEM}_T1w", **changes: Any) -> CaseRecord:
    return record_of(case, **changes)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "sub-01" / "ses-1" / "anat").mkdir(parents=True)
    description = {"Name": "Heads", "Authors": ["A"], "DatasetDOI": "doi:10.1/x", "License": "CC0"}
    (root / "dataset_description.json").write_text(json.dumps(description))
    return root


@pytest.fixture
def out(tmp_path: Path) -> OutputFolder:
    folder = store(tmp_path / "out")
    folder.labels.write_text(json.dumps(LABELS))
    return folder


def content(out: OutputFolder, name: str) -> Any:
    return json.loads((out.root / name).read_text())


def rows(out: OutputFolder, name: str) -> list[list[str]]:
    return [line.split("\t") for line in (out.root / name).read_text().splitlines()]


def test_a_label_map_names_its_source_and_what_made_it(dataset: Path, out: OutputFolder) -> None:
    BidsDerivatives(dataset, out.root).add(record(warnings=("touches the edge",)))
    facts = content(out, f"{STEM}_desc-volseg_dseg.json")
    assert facts["Sources"] == [f"bids:raw:{STEM}_T1w.nii.gz"]
    assert facts["SourceHashes"] == ["sha256:ab"]
    assert facts["Model"] == {"bundle": "tiny"}
    assert facts["Warnings"] == ["touches the edge"]
    assert content(out, "dataset_description.json")["DatasetLinks"]["raw"] == dataset.as_uri()


def test_volumes_have_a_row_per_structure(dataset: Path, out: OutputFolder) -> None:
    """A sum of structures has no value in the label map."""
    volumes = {"front": 12.5, "back": 0.0, "both": 12.5}
    BidsDerivatives(dataset, out.root).add(record(volumes_mm3=volumes))
    table = rows(out, f"{STEM}_desc-volseg_stats.tsv")
    dictionary = content(out, f"{STEM}_desc-volseg_stats.json")
    assert table == [
        ["index", "name", "volume"],
        ["7", "front", "12.500"],
        ["300", "back", "0.000"],
        ["n/a", "both", "12.500"],
    ]
    assert set(table[0]) <= set(dictionary)
    assert dictionary["volume"]["Units"] == "mm^3"
    assert dictionary["Sources"][0] == f"bids::{STEM}_desc-volseg_dseg.nii.gz"


def test_the_table_of_labels_belongs_to_each_desc(dataset: Path, out: OutputFolder) -> None:
    derivatives = BidsDerivatives(dataset, out.root)
    derivatives.add(record())
    derivatives.add(record(f"{STEM}_FLAIR"))
    for name in ("desc-volseg_dseg.tsv", "desc-volsegFLAIR_dseg.tsv"):
        table = rows(out, name)
        assert table[0] == ["index", "name", "abbreviation", "color", "mapping"]
        assert [row[:2] for row in table[1:]] == [
            ["0", "background"],
            ["7", "front"],
            ["300", "back"],
        ]
    assert (out.root / f"{STEM}_desc-volsegFLAIR_dseg.json").is_file()


def test_a_second_time_writes_nothing(dataset: Path, out: OutputFolder) -> None:
    """Files are derived: the same record gives the same bytes, and no file is touched."""
    BidsDerivatives(dataset, out.root).add(record())
    before = {path: path.stat().st_mtime_ns for path in out.root.rglob("*.*")}
    BidsDerivatives(dataset, out.root).add(record(status="skipped"))
    assert {path: path.stat().st_mtime_ns for path in out.root.rglob("*.*")} == before


def test_what_was_lost_is_written_again(dataset: Path, out: OutputFolder) -> None:
    BidsDerivatives(dataset, out.root).add(record())
    sidecar = out.root / f"{STEM}_desc-volseg_dseg.json"
    text = sidecar.read_text()
    sidecar.write_text("{")
    BidsDerivatives(dataset, out.root).add(record(status="skipped"))
    assert sidecar.read_text() == text


def test_a_case_that_fails_now_keeps_nothing(dataset: Path, out: OutputFolder) -> None:
    BidsDerivatives(dataset, out.root).add(record())
    BidsDerivatives(dataset, out.root).add(record(status="failed", error="no file"))
    assert list((out.root / "sub-01").rglob("*.*")) == []


def test_a_case_of_another_name_is_no_error(dataset: Path, out: OutputFolder) -> None:
    BidsDerivatives(dataset, out.root).add(record("sub-01/anat/sub-01_acq_T1w", status="failed"))
    assert list(out.root.glob("sub-*")) == []


def test_what_describes_label_maps_that_are_gone_is_removed(
    dataset: Path, out: OutputFolder
) -> None:
    derivatives = BidsDerivatives(dataset, out.root)
    derivatives.add(record())
    derivatives.add(record("sub-02/anat/sub-02_T1w"))
    kept = out.root / f"{STEM}_desc-volseg_dseg.nii.gz"
    kept.touch()
    remove_orphans(out.root)
    names = sorted(path.name for path in (out.root).glob("sub-*/**/*.*"))
    assert names == [f"sub-01_ses-1_desc-volseg_{end}" for end in
                     ("dseg.json", "dseg.nii.gz", "stats.json", "stats.tsv")]  # fmt: skip


def test_the_dataset_says_where_it_comes_from(dataset: Path, out: OutputFolder) -> None:
    BidsDerivatives(dataset, out.root).add(record())
    described = content(out, "dataset_description.json")
    assert described["DatasetType"] == "derivative"
    assert described["GeneratedBy"][0]["Name"] == "volseg"
    assert described["GeneratedBy"][0]["Version"]
    assert described["SourceDatasets"] == [{"URL": dataset.as_uri(), "DOI": "doi:10.1/x"}]
    assert (described["Authors"], described["License"]) == (["A"], "CC0")


def test_within_the_dataset_the_link_is_relative(dataset: Path) -> None:
    """So that the dataset may be moved with its derivatives."""
    out = store(dataset / "derivatives" / "volseg")
    BidsDerivatives(dataset, out.root).add(record())
    assert content(out, "dataset_description.json")["DatasetLinks"] == {"raw": "../.."}


def test_what_somebody_added_stays(dataset: Path, out: OutputFolder) -> None:
    BidsDerivatives(dataset, out.root).add(record())
    described = content(out, "dataset_description.json")
    described |= {"Name": "Ours", "Funding": ["X"], "GeneratedBy": [{"Name": "volseg"}]}
    (out.root / "dataset_description.json").write_text(json.dumps(described))
    (out.root / "README.md").write_text("ours")
    BidsDerivatives(dataset, out.root).add(record())
    again = content(out, "dataset_description.json")
    assert (again["Name"], again["Funding"]) == ("Ours", ["X"])
    assert "Version" in again["GeneratedBy"][0]
    assert (out.root / "README.md").read_text() == "ours"


@pytest.mark.parametrize("name", [".", "out", "sub-01/x", "derivatives/../out"])
def test_a_folder_in_the_dataset_is_refused(dataset: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"lies in the dataset itself.*derivatives/volseg"):
        check_derivatives_folder(dataset, dataset / name)


@pytest.mark.parametrize(
    ("described", "says"),
    [
        ({"GeneratedBy": [{"Name": "fMRIPrep"}]}, "fMRIPrep"),
        ({"Name": "raw"}, "an unknown program"),
        ([], "an unknown program"),
    ],
)
def test_a_folder_of_another_program_is_refused(
    dataset: Path, tmp_path: Path, described: Any, says: str
) -> None:
    (tmp_path / "dataset_description.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=f"holds a dataset of {says}"):
        check_derivatives_folder(dataset, tmp_path)


def test_folders_that_may_be_written_to(dataset: Path, tmp_path: Path) -> None:
    check_derivatives_folder(dataset, tmp_path / "new")
    check_derivatives_folder(dataset, dataset / "derivatives" / "volseg")


@pytest.mark.parametrize(
    ("environment", "container"),
    [
        ({}, {}),
        ({"VOLSEG_CONTAINER": "docker:volseg:1"}, {"Type": "docker", "Tag": "volseg:1"}),
        (
            {"VOLSEG_CONTAINER": "docker:volseg:1", "APPTAINER_CONTAINER": "/a b.sif"},
            {"Type": "apptainer", "Tag": "volseg:1", "URI": "file:///a%20b.sif"},
        ),
        ({"SINGULARITY_CONTAINER": "x.sif"}, {"Type": "singularity"}),
    ],
)
def test_the_container_is_known_by_its_environment(
    environment: dict[str, str], container: dict[str, str]
) -> None:
    assert _container(environment) == container
