from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

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
from pipeline.inference.device import processor_name
from pipeline.inference.openvino_models import (
    CACHE_VARIABLE,
    OpenVinoNetwork,
    cached_model,
    disagreement,
)
from pipeline.inference.runtime import Runtime, RuntimeDescription, RuntimeName
from pipeline.inference.sliding_window import build_inferer
from pipeline.networks import build_network

# looked up, not imported: an import here would be one with telemetry
pytestmark = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")


def computes(ours: Runtime) -> tuple[str, str]:
    """Return the runtime and the precision that a called `Runtime` computes in."""
    assert ours.description is not None
    return ours.description.runtime, ours.description.precision


def made(dims: int = 3, seed: int = 0) -> tuple[torch.nn.Module, Spec]:
    torch.manual_seed(seed)
    spec = parse_spec(dims)
    return build_network(spec).eval(), spec


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dims", [2, 3])
def test_openvino_gives_torchs_logits(dims: int, batch: int) -> None:
    """They agree to 1e-4, for one window or several, and again from the cache."""
    net, spec = made(dims)
    x = torch.randn(batch, 1, *spec.roi_size)
    with torch.no_grad():
        expected = net(x)
        for _ in range(2):
            ours = Runtime(net, spec)
            torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)
            assert computes(ours) == ("openvino", "float32")
            torch.testing.assert_close(
                Runtime(net, spec, runtime="torch")(x), expected, rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.slow
def test_an_ensemble_runs_in_openvino(dims: int) -> None:
    """It is one network there and agrees with torch to 1e-4."""
    spec = parse_spec(dims, network={"features": [4, 6], "norm": "instance", "ensemble": 3})
    net = build_network(spec).eval()
    ours, x = Runtime(net, spec), torch.randn(1, 1, *spec.roi_size)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), net(x), rtol=1e-4, atol=1e-4)
    assert computes(ours) == ("openvino", "float32")


def test_results_do_not_share_memory() -> None:
    """The logits of one window do not change when the next one is computed."""
    net, spec = made()
    ours = Runtime(net, spec)
    first = ours(torch.randn(1, 1, *spec.roi_size))
    before = first.clone()
    ours(torch.randn(1, 1, *spec.roi_size))
    assert torch.equal(first, before)


@pytest.mark.slow
def test_other_weights_are_converted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of the cache contains the weights, and several threads may fill it at once."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    net, spec = made()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: cached_model(net, spec, "float32"), range(4)))
    assert [disagreement(one.agreement, "float32") for one in found] == [None] * 4
    assert len(list(tmp_path.iterdir())) == 1
    with torch.no_grad():
        next(iter(net.parameters())).add_(0.1)
    cached_model(net, spec, "float32")
    assert len(list(tmp_path.iterdir())) == 2


def test_without_a_cache_folder_it_runs_nevertheless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file has the name of the folder."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    net, spec = made()
    with pytest.warns(UserWarning, match="no cache there"):
        assert Runtime(net, spec)(torch.zeros(1, 1, *spec.roi_size)).shape == (1, 3, *spec.roi_size)


def test_a_runtime_that_disagrees_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch runs instead, with a warning; --runtime openvino is an error."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    net, spec = made()
    cached_model(net, spec, "float32")
    report = next(tmp_path.glob("*/report.json"))
    content = json.loads(report.read_text())
    content |= {"logit_difference": 0.3, "label_agreement": 0.9}
    report.write_text(json.dumps(content))
    ours = Runtime(net, spec)
    with pytest.warns(UserWarning, match=r"logits differ from torch's by 0.3 standard deviations"):
        ours(torch.zeros(1, 1, *spec.roi_size))
    assert computes(ours) == ("torch", "float32")
    with pytest.raises(ConfigError, match="choose --runtime torch"):
        Runtime(net, spec, runtime="openvino")(torch.zeros(1, 1, *spec.roi_size))


def test_without_openvino_torch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning contains the command that installs it."""
    monkeypatch.setattr(runtime, "openvino_version", lambda: None)
    net, spec = made()
    ours = Runtime(net, spec)
    with pytest.warns(UserWarning, match="pip install openvino"):
        ours(torch.zeros(1, 1, *spec.roi_size))
    assert computes(ours) == ("torch", "float32")


def test_bfloat16_is_close_to_float32() -> None:
    """In torch, which has it on any processor."""
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
    ("agreement", "expected"), [(0.995, "bfloat16"), (0.985, "float32")], ids=["close", "not close"]
)
def test_with_amx_auto_is_bfloat16_where_labels_agree(
    agreement: float, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked for counts here: a processor without AMX computes it in float32."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(runtime, "has_amx", lambda: True)
    net, spec = made()
    cached_model(net, spec, "bfloat16")
    report = next(tmp_path.glob("*/report.json"))
    report.write_text(json.dumps(json.loads(report.read_text()) | {"label_agreement": agreement}))
    asked: list[str] = []

    class Asked(OpenVinoNetwork):
        def __init__(self, model: Any, precision: str) -> None:
            asked.append(precision)
            super().__init__(model, precision)

    monkeypatch.setattr(runtime, "OpenVinoNetwork", Asked)
    x = torch.randn(1, 1, *spec.roi_size)
    found = Runtime(net, spec)(x)
    assert asked == [expected]
    with torch.no_grad():
        assert float((found - net(x)).abs().max()) < 0.2
    Runtime(net, spec, precision="float32")(x)
    assert asked == [expected, "float32"]


def test_with_amx_torch_stays_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "has_amx", lambda: True)
    net, spec = made()
    ours = Runtime(net, spec, runtime="torch")
    ours(torch.zeros(1, 1, *spec.roi_size))
    assert computes(ours) == ("torch", "float32")


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
def test_unknown_choices_are_refused(changes: dict[str, Any], message: str) -> None:
    """On construction, before anything is computed."""
    with pytest.raises(ConfigError, match=message):
        Runtime(*made(), **changes)


def test_int8_needs_its_model(tiny_bundle_3d: Path) -> None:
    """The message contains the command that makes it."""
    net, spec = made()
    with pytest.raises(
        ConfigError, match=r"volseg export .* --to openvino --precision int8 --calibrate FOLDER"
    ):
        Runtime(net, spec, bundle_root=tiny_bundle_3d, precision="int8")(
            torch.zeros(1, 1, *spec.roi_size)
        )


def test_both_runtimes_give_the_same_labels(tiny_bundle: Path, volume_file: Path) -> None:
    """From the file to the labels."""
    ours, torchs = (
        segment(open_bundle(tiny_bundle, device="cpu", runtime=name), str(volume_file))
        for name in ("openvino", "torch")
    )
    assert (ours.labels == torchs.labels).mean() > 0.999
    assert len(np.unique(ours.labels)) > 1


def test_a_bundle_wired_without_a_runtime(
    tiny_bundle_3d: Path, volume_file: Path, tmp_path: Path
) -> None:
    """A trusted wiring without one works as MONAI's parts do; to ask for a runtime is an error."""
    old = tmp_path / "old"
    shutil.copytree(tiny_bundle_3d, old)
    wiring = old / "configs" / "inference.yaml"
    content = yaml.safe_load(wiring.read_text())
    del content["runtime"]
    for part in ("model", "evaluator"):
        content[part]["network"] = "@network"
    wiring.write_text(yaml.safe_dump(content, sort_keys=False))
    new, plain = (
        segment(open_bundle(root, device="cpu", trust=True), str(volume_file)).labels
        for root in (tiny_bundle_3d, old)
    )
    assert (new == plain).mean() > 0.999
    with pytest.raises(ConfigError, match="refresh the bundle"):
        open_bundle(old, device="cpu", runtime="torch", trust=True)


@pytest.mark.parametrize(
    ("dims", "features"), [(2, (2, 4)), (3, (2, 4)), (2, (2, 3, 4, 5, 6)), (3, (2, 2, 3))]
)
@pytest.mark.slow
def test_an_unpadded_network_runs_in_openvino(dims: int, features: tuple[int, ...]) -> None:
    """Its output is smaller than the window; a tiled volume is the same in both runtimes."""
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
    assert computes(ours) == ("openvino", "float32")
    with torch.no_grad():
        torch.testing.assert_close(found, build_inferer(spec)(volume, net), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_the_description_is_what_computes(name: Literal["torch", "openvino"]) -> None:
    """It is known after the first call."""
    net, spec = made()
    unused, ours = Runtime(net, spec, runtime=name), Runtime(net, spec, runtime=name)
    ours(torch.zeros(1, 1, *spec.roi_size))
    assert unused.description is None
    assert ours.description == RuntimeDescription(
        runtime=name,
        precision="float32",
        openvino_version=version("openvino") if name == "openvino" else None,
        device="cpu",
        processor=processor_name(torch.device("cpu")),
    )
    assert ours.description.processor


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_it_can_be_prepared_before_the_first_case(name: RuntimeName, dims: int) -> None:
    """From several threads; the description is that of the first call, which prepares no more."""
    net, spec = made(dims)
    ours, called = Runtime(net, spec, runtime=name), Runtime(net, spec, runtime=name)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ours.prepare, [torch.device("cpu"), "cpu"] * 4))
    prepared = ours._prepared
    x = torch.randn(1, 1, *spec.roi_size)
    assert torch.equal(ours(x), called(x))
    assert ours._prepared is prepared
    assert found == [called.description] * 8
    assert ours.description == called.description


def test_prepare_raises_what_the_first_call_would(tiny_bundle_3d: Path) -> None:
    net, spec = made()
    ours = Runtime(net, spec, bundle_root=tiny_bundle_3d, precision="int8")
    with pytest.raises(ConfigError, match="volseg export"):
        ours.prepare("cpu")
    assert ours.description is None


@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_several_threads_get_their_own_logits(
    name: RuntimeName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may all be the first to call it: it is prepared once."""
    net, spec = made()
    ours = Runtime(net, spec, runtime=name)
    prepared: list[torch.device] = []
    prepare = ours._prepare

    def counted(device: torch.device) -> Any:
        prepared.append(device)
        return prepare(device)

    monkeypatch.setattr(ours, "_prepare", counted)
    windows = [torch.randn(1 + i % 2, 1, *spec.roi_size) for i in range(12)]
    together = threading.Barrier(4)

    def compute(window: torch.Tensor) -> torch.Tensor:
        if not prepared:
            together.wait()
        logits: torch.Tensor = ours(window)
        return logits

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(compute, windows))
    assert len(prepared) == 1
    with torch.no_grad():
        for window, logits in zip(windows, found, strict=True):
            torch.testing.assert_close(logits, net(window), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["torch", "openvino"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"]
)
def test_a_copy_is_prepared_again(name: RuntimeName, copied: Callable[[Runtime], Runtime]) -> None:
    """Neither a lock nor a compiled model can be copied."""
    net, spec = made()
    ours, x = Runtime(net, spec, runtime=name), torch.randn(1, 1, *spec.roi_size)
    expected = ours(x)
    other = copied(ours)
    assert other.description is None
    assert torch.equal(other(x), expected)
    assert other.description == ours.description
    assert torch.equal(ours(x), expected)


def send_logits(ours: Runtime, x: Any, pipe: Any) -> None:
    """Send the logits of a window, as numpy arrays: torch's tensors share memory by files."""
    torch.set_num_threads(1)
    pipe.send(ours(torch.from_numpy(x)).numpy())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("name", ["torch", "openvino"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_gets_the_same_logits(name: RuntimeName, method: str) -> None:
    """A forked process uses what is prepared, a spawned one prepares again."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"{method} does not exist on this system")
    net, spec = made()
    # a process that is spawned has none of the fixtures: it would choose the precision itself
    ours = Runtime(net, spec, runtime=name, precision="float32")
    x = torch.randn(1, 1, *spec.roi_size)
    expected = ours(x).numpy()
    context: Any = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_logits, args=(ours, x.numpy(), sender))
    process.start()
    assert receiver.poll(300)
    found = receiver.recv()
    process.join()
    assert process.exitcode == 0
    np.testing.assert_array_equal(found, expected)


NO_TELEMETRY = """
import os, socket, sys
def refuse(*arguments, **options):
    raise AssertionError(f"connection to {arguments}")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from pipeline.inference import import_openvino
home = os.path.expanduser("~")
before = set(os.listdir(home))  # Matplotlib's folders
ov = import_openvino()
import openvino.tools.ovc.convert_impl as convert_impl
assert convert_impl.tm.__name__ == "openvino.tools.ovc.telemetry_stub", convert_impl.tm
assert sys.modules["openvino_telemetry"] is None
import torch
ov.convert_model(torch.nn.Conv2d(1, 1, 3), example_input=torch.zeros(1, 1, 8, 8))
assert set(os.listdir(home)) == before
"""


@pytest.mark.slow
def test_openvino_is_imported_without_telemetry(tmp_path: Path) -> None:
    """Nothing is sent, and nothing is written into the home folder."""
    environment = os.environ | {"HOME": str(tmp_path), "LOCALAPPDATA": str(tmp_path)}
    environment.pop("CI", None)  # OpenVINO's telemetry is off there anyway
    subprocess.run([sys.executable, "-c", NO_TELEMETRY], env=environment, check=True)
