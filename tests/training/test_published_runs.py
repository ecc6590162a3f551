"""Each published U-Net trains and segments from its own configuration, with fewer features."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from phantom import nifti, oblique, save, smooth

from pipeline.bundle.check import check_bundle
from pipeline.cli.app import main

ROOT = Path(__file__).parents[2]
RUNS = sorted(ROOT.glob("configs/unet_*.yaml"))
SPACING = (1.0, 1.1, 0.9)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return as many volumes as one step mixes; their labels follow from intensities."""
    root = tmp_path_factory.mktemp("classics")
    pairs = []
    for i in range(4):
        array = smooth((17 + i, 24, 21), seed=i)
        label = np.select([array > 130, array > 110], [2, 1], 0).astype(np.uint8)
        pair = {"image": f"images/case_{i}.nii.gz", "label": f"labels/case_{i}.nii.gz"}
        save(root / pair["image"], nifti(array, oblique(SPACING)))
        save(root / pair["label"], nib.Nifti1Image(label, oblique(SPACING)))
        pairs.append(pair)
    (root / "dataset.json").write_text(json.dumps({"training": pairs}))
    return root


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
@pytest.mark.slow
def test_it_trains_and_segments(path: Path, dataset: Path, tmp_path: Path) -> None:
    """One epoch gives a bundle that passes its checks and segments on the file's own grid."""
    bundle = Path(yaml.safe_load(path.read_text())["bundle"])
    spec = yaml.safe_load((ROOT / bundle / "configs" / "spec.yaml").read_text())
    spec["network"]["features"] = [2 + i for i in range(len(spec["network"]["features"]))]
    own = tmp_path / "bundle"
    (own / "configs").mkdir(parents=True)
    (own / "configs" / "spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    (own / "configs" / "card.yaml").write_text(
        (ROOT / bundle / "configs" / "card.yaml").read_text()
    )
    changes = [f"bundle={own}", f"dataset={dataset}", "splits=null", "epochs=1", "minutes=null"]
    threads = torch.get_num_threads()
    trained = CliRunner().invoke(main, ["train", str(path), *changes], catch_exceptions=False)
    torch.set_num_threads(threads)
    assert trained.exit_code == 0, trained.output
    assert check_bundle(own).errors == {}
    volume = dataset / "images" / "case_0.nii.gz"
    segmented = CliRunner().invoke(
        main, ["segment", str(volume), "-o", str(tmp_path / "out"), "-b", str(own)]
    )
    assert segmented.exit_code == 0, segmented.output
    labels, image = nib.load(tmp_path / "out" / "case_0_seg.nii.gz"), nib.load(volume)
    assert labels.shape == image.shape
    np.testing.assert_array_equal(labels.affine, image.affine)
    assert set(np.unique(labels.dataobj)) <= {0, 1, 2}
