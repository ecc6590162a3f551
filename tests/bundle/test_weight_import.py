"""A published checkpoint becomes a complete bundle that segments a volume on its own grid."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from references import Buda, Published, Tutorial, trained

from pipeline.bundle.check import check_bundle
from pipeline.bundle.weight_import import PUBLISHED_NETWORKS, import_checkpoint
from pipeline.cli.app import main
from pipeline.config.paths import BundlePaths
from pipeline.config.run import load_run
from pipeline.config.spec import load_spec
from pipeline.errors import ConfigError
from pipeline.io.cases import find_cases
from pipeline.networks.published import PublishedKind

REFERENCES: dict[PublishedKind, type[Published]] = {"tutorial": Tutorial, "buda": Buda}


def volseg_import(checkpoint: Path, output: Path) -> Result:
    return CliRunner().invoke(main, ["import", str(checkpoint), "-o", str(output)])


@pytest.fixture(
    params=[("tutorial", 2), ("buda", 2), ("buda", 3)], ids=["tutorial", "buda", "buda-3D"]
)
def imported(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """The kind of network and the imported bundle; the checkpoint is weights.pt next to it."""
    kind, dims = request.param
    torch.manual_seed(0)
    network = trained(REFERENCES[kind](dims, features=2))
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    result = volseg_import(tmp_path / "weights.pt", tmp_path / "imported")
    assert result.exit_code == 0, result.output
    return kind, tmp_path / "imported"


@pytest.mark.slow
def test_the_bundle_is_complete(imported: tuple[str, Path]) -> None:
    kind, root = imported
    assert check_bundle(root).errors == {}
    paths = BundlePaths(root)
    spec = load_spec(paths.spec)
    assert len(spec.channels) == 3
    assert spec.outputs == ("abnormality" if kind == "buda" else "structure",)
    assert paths.licence.is_file()
    readme = paths.readme.read_text()
    assert ("82 %" in readme and "91 %" in readme) == (kind == "buda")
    if kind == "buda":
        assert (spec.fallback_channel, spec.largest_component) == ("FLAIR", ("each",))
        assert load_run(paths.run).loss == "dice"


@dataclass(frozen=True, kw_only=True)
class Import:
    """A published network with other channels than the published weights, and its spec."""

    kind: PublishedKind
    in_channels: int
    out_channels: int
    channels: list[str]
    structures: list[str]
    output: str


IMPORTS = {
    "FLAIR alone": Import(
        kind="buda",
        in_channels=1,
        out_channels=1,
        channels=["FLAIR"],
        structures=["abnormality"],
        output="sigmoid",
    ),
    "several sigmoids": Import(
        kind="buda",
        in_channels=2,
        out_channels=3,
        channels=["channel_1", "channel_2"],
        structures=["structure_1", "structure_2", "structure_3"],
        output="sigmoid",
    ),
    "softmax": Import(
        kind="tutorial",
        in_channels=1,
        out_channels=3,
        channels=["channel_1"],
        structures=["structure_1", "structure_2"],
        output="softmax",
    ),
    "one output": Import(
        kind="tutorial",
        in_channels=2,
        out_channels=1,
        channels=["channel_1", "channel_2"],
        structures=["structure"],
        output="sigmoid",
    ),
}


@pytest.mark.parametrize("example", IMPORTS.values(), ids=IMPORTS)
def test_channels_and_labels_follow_from_the_weights(example: Import, tmp_path: Path) -> None:
    network = REFERENCES[example.kind](
        2, in_channels=example.in_channels, out_channels=example.out_channels, features=2
    )
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    published = import_checkpoint(tmp_path / "weights.pt", tmp_path / "imported")
    assert published is PUBLISHED_NETWORKS[example.kind]
    spec = load_spec(BundlePaths(tmp_path / "imported").spec)
    assert list(spec.channels) == example.channels
    assert list(spec.labels) == ["background", *example.structures]
    assert spec.output == example.output
    assert spec.fallback_channel == ("FLAIR" if "FLAIR" in example.channels else None)


def test_it_segments_one_flair_on_its_own_grid(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = trained(Buda(features=2)).state_dict()
    weights["conv.bias"] += 0.5  # so that something is found
    torch.save(weights, tmp_path / "weights.pt")
    voxels = np.zeros((41, 50, 9), dtype=np.float32)
    voxels[5:30, 8:44, 2:8] = np.random.default_rng(0).uniform(50, 900, (25, 36, 6))
    affine = np.array([[0, -0.9, 0, 20], [1.1, 0, 0, -30], [0, 0, 4.0, 10], [0, 0, 0, 1]])
    volume, bundle, output = tmp_path / "sub-01_FLAIR.nii.gz", tmp_path / "flair", tmp_path / "out"
    nib.save(nib.Nifti1Image(voxels, affine), volume)
    assert volseg_import(tmp_path / "weights.pt", bundle).exit_code == 0
    result = CliRunner().invoke(
        main, ["segment", str(volume), "-o", str(output), "-b", str(bundle)]
    )
    assert result.exit_code == 0, result.output
    label_map = nib.load(output / "sub-01_seg.nii.gz")
    assert label_map.shape == voxels.shape
    assert np.allclose(label_map.affine, affine)
    labels = np.asarray(label_map.dataobj)
    assert labels.any()
    assert not labels[:, :, :2].any(), "slices that were cropped are background"
    assert not labels[:, :, 8:].any()
    assert "one file serves for several channels" in (output / "cases.csv").read_text()


def test_flair_is_used_for_channels_without_a_file(tmp_path: Path) -> None:
    torch.save(Buda(features=2).state_dict(), tmp_path / "weights.pt")
    assert volseg_import(tmp_path / "weights.pt", tmp_path / "bundle").exit_code == 0
    spec = load_spec(BundlePaths(tmp_path / "bundle").spec)
    scans = tmp_path / "scans"
    scans.mkdir()
    for name in ("a_pre", "a_FLAIR", "a_post", "b_FLAIR", "b_post", "c"):
        (scans / f"{name}.nii.gz").touch()
    cases = {
        case["case"]: [Path(path).name.split(".")[0] for path in case["image"]]
        for case in find_cases([scans], spec)
    }
    assert cases == {
        "a": ["a_pre", "a_FLAIR", "a_post"],
        "b": ["b_FLAIR", "b_FLAIR", "b_post"],
        "c": ["c", "c", "c"],
    }
    (scans / "c_0001.nii.gz").touch()
    problems = {case["case"]: case.get("problem", "") for case in find_cases([scans], spec)}
    assert "c: two files for channel FLAIR" in problems["c"]
    assert problems["a"] == problems["b"] == ""


def test_a_folder_with_a_bundle_is_left_alone(imported: tuple[str, Path]) -> None:
    _, root = imported
    metadata = BundlePaths(root).metadata
    before = json.loads(metadata.read_text())
    result = volseg_import(root.parent / "weights.pt", root)
    assert result.exit_code == 2
    assert "contains a bundle already" in result.output
    assert json.loads(metadata.read_text()) == before


def test_unknown_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"layer.weight": torch.zeros(1)}, tmp_path / "other.pt")
    result = volseg_import(tmp_path / "other.pt", tmp_path / "bundle")
    assert result.exit_code == 2
    assert "unknown weights" in result.output
    assert not (tmp_path / "bundle").exists()


def test_a_softmax_of_background_alone_cannot_be(tmp_path: Path) -> None:
    """Weights without a channel for a structure are refused before anything is written."""
    weights = Buda(features=2).state_dict()
    weights["conv.weight"], weights["conv.bias"] = (
        weights["conv.weight"][:0],
        weights["conv.bias"][:0],
    )
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match="0 output channels: expected background"):
        import_checkpoint(tmp_path / "weights.pt", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
