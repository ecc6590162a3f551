from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from phantom import parse_spec

from pipeline.api import segment
from pipeline.bundle.opening import open_bundle
from pipeline.config.spec import NetworkSpec, Spec
from pipeline.config.unet_sizes import smallest_size
from pipeline.errors import ConfigError
from pipeline.inference import runtime
from pipeline.inference.runtime import CACHE_VARIABLE, Runtime, cached_model
from pipeline.inference.sliding_window import build_inferer
from pipeline.networks.unet import build_network

pytest.importorskip("openvino")


def made(dims: int = 3, seed: int = 0) -> tuple[torch.nn.Module, Spec]:
    torch.manual_seed(seed)
    spec = parse_spec(dims)
    return build_network(spec).eval(), spec


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dims", [2, 3])
def test_openvino_gives_torchs_logits(dims: int, batch: int) -> None:
    """To 1e-4, for one window or several, and again from the cache."""
    net, spec = made(dims)
    x = torch.randn(batch, 1, *spec.roi_size)
    with torch.no_grad():
        expected = net(x)
        for _ in range(2):
            ours = Runtime(net, spec)
            torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)
            assert ours.description == "openvino float32"
            torch.testing.assert_close(
                Runtime(net, spec, runtime="torch")(x), expected, rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("dims", [2, 3])
def test_an_ensemble_runs_in_openvino(dims: int) -> None:
    """As one network, to 1e-4 of what torch makes of its networks."""
    spec = parse_spec(dims, network={"features": [4, 6], "norm": "instance", "ensemble": 3})
    net = build_network(spec).eval()
    ours, x = Runtime(net, spec), torch.randn(1, 1, *spec.roi_size)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), net(x), rtol=1e-4, atol=1e-4)
    assert ours.description == "openvino float32"


def test_results_do_not_share_memory() -> None:
    """The logits of one window stay as they are when the next one comes."""
    net, spec = made()
    ours = Runtime(net, spec)
    first = ours(torch.randn(1, 1, *spec.roi_size))
    before = first.clone()
    ours(torch.randn(1, 1, *spec.roi_size))
    assert torch.equal(first, before)


def test_other_weights_are_converted_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache goes by the weights and the spec, and several processes may fill it at once."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    net, spec = made()
    with ThreadPoolExecutor(4) as pool:
        reasons = list(pool.map(lambda _: cached_model(net, spec, "float32")[1], range(4)))
    assert reasons == [""] * 4
    assert len(list(tmp_path.iterdir())) == 1
    with torch.no_grad():
        next(iter(net.parameters())).add_(0.1)
    cached_model(net, spec, "float32")
    assert len(list(tmp_path.iterdir())) == 2


def test_without_a_cache_folder_it_runs_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is where the folder should be."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    net, spec = made()
    with pytest.warns(UserWarning, match="no cache there"):
        assert Runtime(net, spec)(torch.zeros(1, 1, *spec.roi_size)).shape == (1, 3, *spec.roi_size)


def test_a_runtime_that_disagrees_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch runs instead, with a warning; asked for by name, it is refused."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    net, spec = made()
    cached_model(net, spec, "float32")
    report = next(tmp_path.glob("*/report.json"))
    report.write_text(json.dumps({"logit_difference": 0.3, "label_agreement": 0.9}))
    ours = Runtime(net, spec)
    with pytest.warns(UserWarning, match=r"logits differ from torch's by 0.3 standard deviations"):
        ours(torch.zeros(1, 1, *spec.roi_size))
    assert ours.description == "torch float32"
    with pytest.raises(ConfigError, match="choose --runtime torch"):
        Runtime(net, spec, runtime="openvino")(torch.zeros(1, 1, *spec.roi_size))


def test_without_openvino_torch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a warning that says how to get it."""
    monkeypatch.setattr(
        runtime, "_missing", lambda: "openvino is not installed (`pip install openvino`)"
    )
    net, spec = made()
    ours = Runtime(net, spec)
    with pytest.warns(UserWarning, match="pip install openvino"):
        ours(torch.zeros(1, 1, *spec.roi_size))
    assert ours.description == "torch float32"


def test_bfloat16_is_near() -> None:
    """In torch, on any processor."""
    net, spec = made()
    x = torch.randn(1, 1, *spec.roi_size)
    with torch.no_grad():
        difference = (
            (Runtime(net, spec, runtime="torch", precision="bfloat16")(x).float() - net(x))
            .abs()
            .max()
        )
    assert 0 < difference < 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"runtime": "tensorflow"},
            "runtime: expected one of auto, torch, openvino, got 'tensorflow'",
        ),
        (
            {"precision": "int4"},
            "precision: expected one of auto, float32, bfloat16, int8, got 'int4'",
        ),
        ({"runtime": "torch", "precision": "int8"}, "leave out --runtime torch"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    """Before anything runs."""
    with pytest.raises(ConfigError, match=message):
        Runtime(*made(), **changes)


def test_int8_needs_its_model(tiny_bundle_3d: Path) -> None:
    """The message says how to make it."""
    net, spec = made()
    with pytest.raises(
        ConfigError, match=r"volseg export .* --to openvino --precision int8 --calibrate FOLDER"
    ):
        Runtime(net, spec, bundle_root=tiny_bundle_3d, precision="int8")(
            torch.zeros(1, 1, *spec.roi_size)
        )


def test_both_runtimes_give_the_same_labels(tiny_bundle: Path, volume_file: Path) -> None:
    """File to labels."""
    ours, torchs = (
        segment(open_bundle(tiny_bundle, device="cpu", runtime=name), str(volume_file))
        for name in ("openvino", "torch")
    )
    assert (ours.labels == torchs.labels).mean() > 0.999
    assert len(np.unique(ours.labels)) > 1


def test_a_bundle_wired_before_runtimes(
    tiny_bundle_3d: Path, volume_file: Path, tmp_path: Path
) -> None:
    """A wiring that names no runtime and no finish works as MONAI's parts do, and says so when asked for a runtime."""
    old = tmp_path / "old"
    shutil.copytree(tiny_bundle_3d, old)
    wiring = old / "configs" / "inference.yaml"
    content = yaml.safe_load(wiring.read_text())
    for part in ("runtime", "finish"):
        del content[part]
    for part in ("inferer", "postprocessing"):
        del content[part]["finish"]
    content["evaluator"]["network"] = "@network"
    wiring.write_text(yaml.safe_dump(content, sort_keys=False))
    new, plain = (
        segment(open_bundle(root, device="cpu"), str(volume_file)).labels
        for root in (tiny_bundle_3d, old)
    )
    assert (new == plain).mean() > 0.999
    with pytest.raises(ConfigError, match="refresh the bundle"):
        open_bundle(old, device="cpu", runtime="torch")


@pytest.mark.parametrize(
    ("dims", "features"), [(2, (2, 4)), (3, (2, 4)), (2, (2, 3, 4, 5, 6)), (3, (2, 2, 3))]
)
def test_an_unpadded_network_runs_in_openvino(dims: int, features: tuple[int, ...]) -> None:
    """However deep it is; its output is smaller than the window, and a tiled volume is the same in both runtimes."""
    spec = Spec(
        labels={"background": 0, "one": 1},
        channels=("T1w",),
        spacing=(1.0, 1.0, 1.0),
        roi_size=tuple(
            smallest_size([2] * (len(features) - 1), padding=False) + 16 * i
            for i in range(1, dims + 1)
        ),
        slice_axis="R" if dims == 2 else None,
        overlap=0.0,
        network=NetworkSpec(features=features, padding=False),
    )
    torch.manual_seed(0)
    net = build_network(spec).eval()
    volume = torch.randn(1, 1, 9, 13, 17)
    ours = Runtime(net, spec, runtime="openvino")
    found = build_inferer(spec)(volume, ours)
    assert ours.description == "openvino float32"
    with torch.no_grad():
        torch.testing.assert_close(found, build_inferer(spec)(volume, net), rtol=1e-4, atol=1e-4)
