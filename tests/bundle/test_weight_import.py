"""A published checkpoint becomes a bundle that passes every check and segments a volume on its own grid."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from references import Buda, Tutorial, trained

from pipeline.bundle.check import check_bundle
from pipeline.cli.app import main
from pipeline.config.run import load_run
from pipeline.config.spec import load_spec
from pipeline.errors import ConfigError
from pipeline.io.cases import find_cases

KINDS = {"tutorial": Tutorial, "buda": Buda}


@pytest.fixture(
    params=[("tutorial", 2), ("buda", 2), ("buda", 3)], ids=["tutorial", "buda", "buda-3D"]
)
def imported(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    kind, dims = request.param
    torch.manual_seed(0)
    torch.save(trained(KINDS[kind](dims, features=2)).state_dict(), tmp_path / "weights.pt")
    result = CliRunner().invoke(
        main, ["import", str(tmp_path / "weights.pt"), "-o", str(tmp_path / "adopted")]
    )
    assert result.exit_code == 0, result.output
    return kind, tmp_path / "adopted"


def test_the_bundle_is_complete(imported: tuple[str, Path]) -> None:
    kind, root = imported
    assert check_bundle(root) == dict.fromkeys(check_bundle(root), "")
    said = load_spec(root / "configs" / "spec.yaml")
    assert len(said.channels) == 3
    assert said.outputs == ("abnormality" if kind == "buda" else "structure",)
    assert (root / "LICENSE").is_file()
    readme = (root / "docs" / "README.md").read_text()
    assert ("82 %" in readme and "91 %" in readme) == (kind == "buda")
    if kind == "buda":
        assert (said.stand_in, said.largest_component) == ("FLAIR", ("each",))
        assert load_run(root / "configs" / "run.yaml").loss == "dice"


def test_it_segments_one_flair_on_its_own_grid(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = trained(Buda(features=2)).state_dict()
    weights["conv.bias"] += 0.5  # so that something is found
    torch.save(weights, tmp_path / "weights.pt")
    grey = np.zeros((41, 50, 9), dtype=np.float32)
    grey[5:30, 8:44, 2:8] = np.random.default_rng(0).uniform(50, 900, (25, 36, 6))
    affine = np.array([[0, -0.9, 0, 20], [1.1, 0, 0, -30], [0, 0, 4.0, 10], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(grey, affine), tmp_path / "sub-01_FLAIR.nii.gz")
    invoke = CliRunner().invoke
    assert (
        invoke(
            main, ["import", str(tmp_path / "weights.pt"), "-o", str(tmp_path / "flair")]
        ).exit_code
        == 0
    )
    result = invoke(
        main,
        [
            "segment",
            str(tmp_path / "sub-01_FLAIR.nii.gz"),
            "-o",
            str(tmp_path / "out"),
            "-b",
            str(tmp_path / "flair"),
        ],
    )
    assert result.exit_code == 0, result.output
    found = nib.load(tmp_path / "out" / "sub-01_seg.nii.gz")
    assert found.shape == grey.shape
    assert np.allclose(found.affine, affine)
    labels = np.asarray(found.dataobj)
    assert labels.any()
    assert not labels[:, :, :2].any(), "slices that were cut away are background"
    assert not labels[:, :, 8:].any()
    assert "one file serves for several channels" in (tmp_path / "out" / "cases.csv").read_text()


def test_flair_stands_in_for_the_channels_that_have_no_file(tmp_path: Path) -> None:
    torch.save(Buda(features=2).state_dict(), tmp_path / "weights.pt")
    assert (
        CliRunner()
        .invoke(main, ["import", str(tmp_path / "weights.pt"), "-o", str(tmp_path / "b")])
        .exit_code
        == 0
    )
    said = load_spec(tmp_path / "b" / "configs" / "spec.yaml")
    scans = tmp_path / "scans"
    scans.mkdir()
    for name in ("a_pre", "a_FLAIR", "a_post", "b_FLAIR", "b_post", "c"):
        (scans / f"{name}.nii.gz").touch()
    cases = {
        case["case"]: [Path(path).name.split(".")[0] for path in case["image"]]
        for case in find_cases([scans], said)
    }
    assert cases == {
        "a": ["a_pre", "a_FLAIR", "a_post"],
        "b": ["b_FLAIR", "b_FLAIR", "b_post"],
        "c": ["c", "c", "c"],
    }
    (scans / "c_0001.nii.gz").touch()
    with pytest.raises(ConfigError, match="c: two files for channel FLAIR"):
        find_cases([scans], said)


def test_a_folder_with_a_bundle_is_left_alone(imported: tuple[str, Path]) -> None:
    _, root = imported
    before = json.loads((root / "configs" / "metadata.json").read_text())
    result = CliRunner().invoke(main, ["import", str(root.parent / "weights.pt"), "-o", str(root)])
    assert result.exit_code == 2
    assert "holds a bundle already" in result.output
    assert json.loads((root / "configs" / "metadata.json").read_text()) == before


def test_unknown_weights_are_told_from_known_ones(tmp_path: Path) -> None:
    torch.save({"layer.weight": torch.zeros(1)}, tmp_path / "other.pt")
    result = CliRunner().invoke(
        main, ["import", str(tmp_path / "other.pt"), "-o", str(tmp_path / "b")]
    )
    assert result.exit_code == 2
    assert "unknown weights" in result.output
    assert not (tmp_path / "b").exists()
