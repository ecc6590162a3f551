"""Regions and ignored voxels from the dataset to the label map, by `volseg train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from phantom import CARD, make_bundle, nifti, oblique, smooth, spec_content

from pipeline.bundle import check_bundle, open_bundle, read_wiring
from pipeline.cli.app import main
from pipeline.inference import predict_case
from pipeline.types import Array

CASES = 6
LABELS = {"background": 0, "whole": 1, "core": 2}
REGIONS = {"whole": [1, 2], "core": [2]}


def reference(array: Array) -> Array:
    """The bright half is the whole, its brightest part the core."""
    return np.select([array > 115, array > 95], [2, 1], 0).astype(np.uint8)


def train(folder: Path, *, hidden: int | None = None, **spec: Any) -> Path:
    """Train a small bundle on volumes whose labels follow from intensities.

    Args:
        folder: gets dataset and bundle.
        hidden: value of the label map below the ignored voxels; None ignores none.
        spec: changes of the spec.
    """
    pairs = []
    for i in range(CASES):
        array = smooth((17 + i, 24, 21), seed=i)
        label = reference(array)
        if hidden is not None:
            label[:, :, 12:] = hidden
        pair = {"image": f"images/{i}.nii.gz", "label": f"labels/{i}.nii.gz"}
        for key, image in (("image", nifti(array)), ("label", nib.Nifti1Image(label, oblique()))):
            path = folder / "data" / pair[key]
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(image, path)
        pairs.append(pair)
    (folder / "data" / "dataset.json").write_text(json.dumps({"training": pairs}))
    configs = folder / "bundle" / "configs"
    configs.mkdir(parents=True)
    content = spec_content(
        3,
        labels=LABELS,
        spacing=[None] * 3,
        network={"features": [6, 8], "norm": "instance"},
        overlap=0.25,
    )
    run = {
        "bundle": str(folder / "bundle"),
        "dataset": str(folder / "data"),
        "epochs": 20,
        "batch_size": 4,
        "patches_per_case": 2,
        "learning_rate": 0.1,
        "augment": {"affine_chance": 0.0, "intensity_chance": 0.0, "noise_chance": 0.0},
        "sampling": "balanced",
    }
    (configs / "spec.yaml").write_text(yaml.safe_dump(content | spec, sort_keys=False))
    (configs / "card.yaml").write_text(yaml.safe_dump(CARD))
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    threads = torch.get_num_threads()
    result = CliRunner().invoke(main, ["train", str(folder / "run.yaml")], catch_exceptions=False)
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return folder / "bundle"


def region_dice(bundle: Path) -> dict[str, float]:
    """Dice of each region on a new volume."""
    model = open_bundle(bundle, device="cpu", runtime="torch")
    array = smooth((22, 25, 23), seed=77)
    found, true = predict_case(model, nifti(array)).labels, reference(array)
    scores = {}
    for name, values in REGIONS.items():
        mask, expected = np.isin(found, values), np.isin(true, values)
        scores[name] = 2 * (mask & expected).sum() / (mask.sum() + expected.sum())
    return scores


@pytest.mark.slow
def test_regions_are_learnt_and_painted(tmp_path: Path) -> None:
    """`volseg train` on region labels gives a bundle that passes its check and finds them."""
    bundle = train(tmp_path, output="regions", regions=REGIONS)
    assert check_bundle(bundle).errors == {}
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    output = metadata["network_data_format"]["outputs"]["pred"]
    assert output["channel_def"] == {"0": "whole", "1": "core"}
    assert output["num_channels"] == 2
    scores = region_dice(bundle)
    assert scores["whole"] > 0.8
    assert scores["core"] > 0.5


@pytest.mark.slow
def test_ignored_voxels_are_not_learnt(tmp_path: Path) -> None:
    """With half of each volume ignored, the other half is enough; ignored is no structure.

    As if they were background, the structures would be lost there.
    """
    ignored = region_dice(train(tmp_path / "a", hidden=5, ignore_label=5))
    background = region_dice(train(tmp_path / "b", hidden=0))
    assert ignored["whole"] > 0.8
    assert ignored["core"] > 0.5
    assert ignored["whole"] > background["whole"]


def test_the_wiring_accumulates_gradients(tmp_path: Path, dataset: Path) -> None:
    """MONAI's trainer gets the run's number of batches."""
    run = {"dataset": str(dataset), "accumulate": 3}
    labels = {"background": 0, "bright": 1}
    parser = read_wiring(make_bundle(tmp_path / "tiny", run=run, labels=labels))
    assert parser.get_parsed_content("train::trainer").accumulation_steps == 3
