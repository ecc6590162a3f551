"""The exported network gives the logits of torch, and the report states how closely."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import onnx_export

from pipeline.api import segment
from pipeline.bundle.export import ExportReport, Format, export_bundle
from pipeline.bundle.opening import open_bundle
from pipeline.config.paths import BundlePaths
from pipeline.errors import ConfigError, OpenVinoError
from pipeline.inference import openvino_trial
from pipeline.inference.openvino_models import OpenVinoNetwork, openvino_core
from pipeline.inference.runtime import Runtime

pytest.importorskip("openvino")


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to write into."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / tiny_bundle.name))


@pytest.mark.parametrize("to", ["openvino", "torchscript", "onnx"])
def test_exports_agree_with_torch(bundle: Path, to: Format, volume_file: Path) -> None:
    """The report that is returned is the one next to the file."""
    if to == "onnx" and not (find_spec("onnx") and find_spec("onnxscript")):
        with pytest.raises(ConfigError, match="pip install onnx"):
            export_bundle(bundle, "onnx")
        return
    report = export_bundle(bundle, to, calibrate=[volume_file])
    assert report["logit_difference"] < 1e-3
    assert report["label_agreement"] > 0.999
    assert report["compared_on"] == "windows of 1 volumes"
    assert set(report) == set(ExportReport.__annotations__)
    path = BundlePaths(bundle).models / report["file"]
    assert path.name in report["sha256"]
    for name, expected in report["sha256"].items():
        assert hashlib.sha256((path.parent / name).read_bytes()).hexdigest() == expected
    if to == "openvino":
        assert report["sha256"].keys() == {"model.xml", "model.bin"}
    assert json.loads(path.with_suffix(".json").read_text()) == report


@pytest.mark.slow
@pytest.mark.skipif(find_spec("onnxscript") is None, reason="onnxscript is not installed")
@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize("use_trace", [False, True])
def test_monais_own_export_to_onnx(bundle: Path, use_trace: bool, tmp_path: Path) -> None:
    """`python -m monai.bundle onnx_export` writes a file that gives torch's logits."""
    model = open_bundle(bundle, device="cpu", runtime="torch")
    window = torch.randn(1, len(model.spec.channels), *model.spec.roi_size)
    onnx_export(
        "network_def",
        filepath=str(tmp_path / "model.onnx"),
        ckpt_file=str(bundle / "models" / "model.pt"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=str(bundle / "configs" / "inference.yaml"),
        bundle_root=str(bundle),
        input_shape=list(window.shape),
        use_trace=use_trace,
    )
    exported = OpenVinoNetwork(openvino_core().read_model(tmp_path / "model.onnx"), "float32")
    with torch.no_grad():
        expected = model.network(window)
    torch.testing.assert_close(exported(window), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("openvino_apart")
@pytest.mark.skipif(os.name != "posix", reason="there are no such signals")
def test_a_crash_of_openvino_is_an_error(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = tmp_path / "crash.py"
    crash.write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(openvino_trial, "CHILD", crash)
    with pytest.raises(OpenVinoError, match=r"crashed .*SIGSEGV"):
        export_bundle(bundle, "openvino")


def test_without_volumes_noise_is_compared(bundle: Path) -> None:
    assert export_bundle(bundle, "torchscript")["compared_on"] == "noise"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("nncf") is None, reason="nncf is not installed")
@pytest.mark.filterwarnings("ignore::Warning")
def test_int8_runs_and_is_bound_to_its_weights(bundle: Path, volume_file: Path) -> None:
    """It gives nearly the labels of float32, and is refused with other weights."""
    report = export_bundle(bundle, "openvino", precision="int8", calibrate=[volume_file])
    assert report["file"] == "model_int8.xml"
    model = open_bundle(bundle, device="cpu", precision="int8")
    int8 = segment(model, str(volume_file)).labels
    assert isinstance(model.network, Runtime)
    description = model.network.description
    assert description is not None
    assert (description.runtime, description.precision) == ("openvino", "int8")
    float32 = segment(open_bundle(bundle, device="cpu"), str(volume_file)).labels
    assert (int8 == float32).mean() > 0.8
    assert len(np.unique(int8)) > 1
    whole = BundlePaths(bundle).int8_model.with_suffix(".bin")
    content = whole.read_bytes()
    for damaged in (bytes(len(content)), content[:-100]):
        whole.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"not as it was exported \(model_int8\.bin"):
            segment(open_bundle(bundle, device="cpu", precision="int8"), str(volume_file))
    whole.write_bytes(content)
    weights = BundlePaths(bundle).weights
    torch.save({name: tensor * 1.01 for name, tensor in torch.load(weights).items()}, weights)
    with pytest.raises(ConfigError, match="was made of other weights"):
        segment(open_bundle(bundle, device="cpu", precision="int8"), str(volume_file))


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_int8_needs_volumes_and_openvino(bundle: Path, to: Format) -> None:
    with pytest.raises(ConfigError, match="needs --calibrate FOLDER"):
        export_bundle(bundle, to, precision="int8")
