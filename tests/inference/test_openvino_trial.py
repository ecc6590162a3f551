"""What OpenVINO does to a process that tries a network does not end the run."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from phantom import parse_spec

from pipeline.api import segment
from pipeline.bundle.opening import open_bundle
from pipeline.config.spec import Spec
from pipeline.errors import ConfigError, OpenVinoError
from pipeline.inference import openvino_trial
from pipeline.inference.openvino_child import REFUSED
from pipeline.inference.openvino_models import (
    CACHE_VARIABLE,
    OpenVinoNetwork,
    cached_model,
    compile_hints,
    noise_window,
)
from pipeline.inference.runtime import Runtime
from pipeline.networks import build_network

pytestmark = [
    pytest.mark.usefixtures("openvino_apart"),
    pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed"),
]
posix = pytest.mark.skipif(os.name != "posix", reason="there are no such signals")

GIVEN = "import json, os, signal, sys, time; given = json.loads(sys.argv[1]); "
CRASH = GIVEN + "os.kill(os.getpid(), signal.SIGSEGV)"
HANG = GIVEN + "time.sleep(600)"
KILLED = GIVEN + "os.kill(os.getpid(), signal.SIGKILL)"
REFUSAL = GIVEN + f"sys.stderr.write('RuntimeError: Check\\nfailed'); sys.exit({REFUSED})"
LASTING = {
    "crash": (CRASH, "crashed while it compiled the network .SIGSEGV."),
    "hang": (HANG, "did not compile the network in 1 seconds"),
    "refusal": (REFUSAL, "refuses the network: RuntimeError: Check failed"),
}
PASSING = {
    "killed": (KILLED, "crashed while it compiled the network .SIGKILL."),
    "no answer": (GIVEN, "gave no usable output"),
    "text": (GIVEN + "open(given['output'], 'w').write('labels')", "gave no usable output"),
    "short": (
        GIVEN + "data = open(given['input'], 'rb').read(); "
        "open(given['output'], 'wb').write(data[:-5])",
        "gave no usable output",
    ),
    "other type": (
        GIVEN
        + "import numpy; numpy.save(given['output'], numpy.load(given['input']).astype('f2'))",
        "gave no usable output .float16",
    ),
    "no interpreter": (GIVEN + "raise ImportError('numpy')", "exit code 1, ImportError: numpy"),
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of this test's own."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def inject(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have other code run in place of the process that tries a network."""
    path = folder / "child.py"
    path.write_text(code)
    monkeypatch.setattr(openvino_trial, "CHILD", path)
    if "sleep" in code:
        monkeypatch.setattr(openvino_trial, "LIMIT_SECONDS", 1)


def made() -> tuple[torch.nn.Module, Spec]:
    torch.manual_seed(0)
    spec = parse_spec()
    return build_network(spec).eval(), spec


@posix
@pytest.mark.parametrize(("code", "message"), LASTING.values(), ids=LASTING)
def test_a_network_that_openvino_cannot_compute_is_tried_once(
    code: str, message: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason is in the cache, and only there is anything left of it."""
    net, spec = made()
    with monkeypatch.context() as patch:
        inject(code, tmp_path, patch)
        with pytest.raises(OpenVinoError, match=message):
            cached_model(net, spec, "float32")
    [entry] = cache.iterdir()
    assert [path.name for path in entry.iterdir()] == ["report.json"]
    inject(GIVEN + "sys.exit('tried again')", tmp_path, monkeypatch)
    with pytest.raises(OpenVinoError, match=f"{message}.*delete {entry} to try again"):
        cached_model(net, spec, "float32")
    # another precision and other weights are other networks
    with pytest.raises(OpenVinoError, match="tried again"):
        cached_model(net, spec, "bfloat16")
    with torch.no_grad():
        next(iter(net.parameters())).add_(0.1)
    with pytest.raises(OpenVinoError, match="tried again"):
        cached_model(net, spec, "float32")


@posix
@pytest.mark.parametrize(("code", "message"), PASSING.values(), ids=PASSING)
def test_what_is_not_the_networks_fault_is_not_remembered(
    code: str, message: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a machine without memory, which kills the process."""
    net, spec = made()
    with monkeypatch.context() as patch:
        inject(code, tmp_path, patch)
        with pytest.raises(OpenVinoError, match=message):
            cached_model(net, spec, "float32")
    assert not list(cache.iterdir())
    assert cached_model(net, spec, "float32").agreement["label_agreement"] > 0.999


@posix
@pytest.mark.parametrize("code", [CRASH, KILLED], ids=["lasting", "passing"])
def test_auto_runs_in_torch(
    code: str,
    cache: Path,
    tmp_path: Path,
    tiny_bundle_3d: Path,
    volume_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a warning that names the reason; `openvino` is an error that names it."""
    inject(code, tmp_path, monkeypatch)
    with pytest.warns(UserWarning, match=r"in torch, not in OpenVINO: OpenVINO .* crashed"):
        found = segment(open_bundle(tiny_bundle_3d, device="cpu"), str(volume_file))
    expected = segment(open_bundle(tiny_bundle_3d, device="cpu", runtime="torch"), str(volume_file))
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert len(np.unique(found.labels)) > 1
    with pytest.raises(ConfigError, match=r"--runtime openvino: .*SIG.*choose --runtime torch"):
        segment(open_bundle(tiny_bundle_3d, device="cpu", runtime="openvino"), str(volume_file))


@posix
def test_what_is_in_the_cache_is_not_tried(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, spec = made()
    cached_model(net, spec, "float32")
    inject(CRASH, tmp_path, monkeypatch)
    assert cached_model(net, spec, "float32").agreement["label_agreement"] > 0.999


@posix
def test_without_a_cache_the_network_is_tried_each_time(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the system's folder for temporary files, of which nothing is left."""
    net, spec = made()
    cache.write_text("a file where the folder would be")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with pytest.warns(UserWarning, match="no cache there"):
        assert cached_model(net, spec, "float32").agreement["label_agreement"] > 0.999
    inject(CRASH, tmp_path, monkeypatch)
    with (
        pytest.warns(UserWarning, match="no cache there"),
        pytest.raises(OpenVinoError, match="SIGSEGV"),
    ):
        cached_model(net, spec, "float32")
    assert not list(scratch.iterdir())


def test_the_reason_of_a_forged_entry_is_not_believed(cache: Path, tmp_path: Path) -> None:
    """A report of another network is damage, which is repaired."""
    net, spec = made()
    cached_model(net, spec, "float32")
    [entry] = cache.iterdir()
    (entry / "report.json").write_text(json.dumps({"key": "0" * 32, "problem": "slow"}))
    assert cached_model(net, spec, "float32").agreement["label_agreement"] > 0.999


@posix
def test_a_process_that_nobody_waits_for_ends(tmp_path: Path) -> None:
    """Its run may have been killed while OpenVINO hangs."""
    given = {"limit": 0.1, "openvino": str(tmp_path)}
    (tmp_path / "openvino.py").write_text("import time; time.sleep(600)")
    code = (
        f"import sys; sys.argv[1:] = [{json.dumps(given)!r}]; sys.path.insert(0, {str(tmp_path)!r})"
        "; from runpy import run_path; "
        f"run_path({str(openvino_trial.CHILD)!r}, run_name='__main__')"
    )
    begun = time.monotonic()
    pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-c", code])
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert time.monotonic() - begun < 300


@pytest.mark.parametrize("dims", [2, 3])
def test_it_computes_what_this_process_computes(dims: int, cache: Path, tmp_path: Path) -> None:
    """For volumes and for slices."""
    spec = parse_spec(dims)
    found = cached_model(build_network(spec).eval(), spec, "float32")
    [path] = cache.glob("*/model.xml")
    window = noise_window(spec)
    hints = compile_hints("float32")
    computed = openvino_trial.first_output(path, window, hints, folder=tmp_path)
    expected = OpenVinoNetwork(found.model, "float32")(window)
    torch.testing.assert_close(computed, expected, rtol=1e-4, atol=1e-4)


def test_signals_have_names() -> None:
    names = [openvino_trial._signal_name(-number) for number in (signal.SIGABRT, 250)]
    if os.name == "posix":
        assert names == ["SIGABRT", "signal 250"]
    assert openvino_trial._signal_name(1) is None


@pytest.mark.slow
def test_a_residual_encoder_runs_whatever_openvino_does(cache: Path) -> None:
    """Version 2026.4.1 crashes on this one where the processor has AMX."""
    spec = parse_spec(
        roi_size=[40, 56, 40],
        network={
            "architecture": "residual_encoder_unet",
            "features": [8, 16, 32, 64],
            "strides": [[2, 2, 2]] * 3,
            "kernels": [[3, 3, 3]] * 4,
            "encoder_blocks": [1, 2, 2, 2],
            "decoder_convolutions": [1, 1, 1],
            "norm": "instance",
            "activation": "leakyrelu",
            "conv_bias": True,
        },
    )
    torch.manual_seed(0)
    net = build_network(spec).eval()
    window = torch.randn(1, 1, *spec.roi_size)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that torch runs
        ours = Runtime(net, spec)
        torch.testing.assert_close(ours(window), net(window), rtol=1e-3, atol=1e-3)
    [entry] = cache.iterdir()
    assert ours.description is not None
    problem = json.loads((entry / "report.json").read_text()).get("problem", "")
    assert (ours.description.runtime == "torch") == ("crashed" in problem)
