from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from click.testing import CliRunner
from phantom import load_script, make_bundle, oblique
from scipy import ndimage

from pipeline.bundle.opening import open_bundle
from pipeline.inference.predictor import predict_case
from pipeline.networks.weights import read_state

CASCADE: dict[str, Any] = {
    "structures": ["front"],
    "spacing": [1.0, 1.0, 1.0],
    "roi_size": [16, 12, 20],
    "network": {"features": [2, 3, 4], "norm": "instance", "deep_supervision": 1},
}


def trained(folder: Path, **changes: Any) -> Path:
    content = {key: value for key, value in CASCADE.items() if key != "structures"}
    return make_bundle(folder, 3, seed=5, **(content | changes))


def test_trained_weights_become_the_second_network(tmp_path: Path) -> None:
    script = load_script("join_cascade")
    bundle = make_bundle(tmp_path / "whole", 3, cascade=CASCADE)
    deep = trained(tmp_path / "deep")
    arguments = [str(bundle), str(deep)]
    result = CliRunner().invoke(script.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    trained_state = read_state(deep / "models" / "model.pt")
    stored = read_state(bundle / "models" / "model_cascade.pt")
    assert stored.keys() == trained_state.keys()
    for name, tensor in trained_state.items():
        torch.testing.assert_close(
            stored[name], tensor.float(), rtol=0, atol=float(tensor.abs().max()) / 250
        )
    blobs = ndimage.gaussian_filter(np.random.default_rng(5).normal(size=(31, 28, 22)), 2)
    labels = predict_case(open_bundle(bundle, device="cpu"), nib.Nifti1Image(blobs, oblique()))
    assert labels.labels.shape == blobs.shape


def test_another_spec_is_refused(tmp_path: Path) -> None:
    script = load_script("join_cascade")
    bundle = make_bundle(tmp_path / "whole", 3, cascade=CASCADE)
    other = trained(tmp_path / "deep", roi_size=[16, 16, 20])
    result = CliRunner().invoke(script.main, [str(bundle), str(other)])
    assert result.exit_code == 1
    assert "differs from the cascade" in result.output and "in roi_size" in result.output
    plain = make_bundle(tmp_path / "plain", 3)
    result = CliRunner().invoke(script.main, [str(plain), str(other)])
    assert result.exit_code == 1 and "expected a cascade, got none" in result.output
