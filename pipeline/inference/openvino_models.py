"""A torch network as a model of OpenVINO: conversion, cache, comparison with torch, inference.

OpenVINO computes a U-Net two to three times faster than torch on a CPU. A network is converted
once, compared with torch, and kept in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import nn
from torch.nn import functional

from pipeline.config import Spec, valid_size_near
from pipeline.types import NetworkFunction

if TYPE_CHECKING:
    import openvino as ov

CACHE_VARIABLE = "VOLSEG_CACHE"
# part of the key of a cache entry, to be changed with what an entry contains
CACHE_LAYOUT = "2"
# voxels per axis of the window that runtimes are compared on, about: large enough for every level
# of a network, and a whole window would take gigabytes in torch
NOISE_VOXELS = 48
# the noise is drawn on a grid so many times coarser, as images are smooth
NOISE_COARSENESS = 4
# OpenVINO's names of the types that it computes in
OPENVINO_TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
INT8_TYPES = {"i8", "u8"}


class Tolerance(NamedTuple):
    """How far another runtime may differ from torch."""

    logit_difference: float
    label_agreement: float


# float32 differs by rounding only; bfloat16 has 8 bits of precision, and only labels count there
TOLERANCES = {"float32": Tolerance(0.01, 0.9995), "bfloat16": Tolerance(0.5, 0.98)}


class RuntimeAgreement(TypedDict):
    """How far another runtime agrees with torch.

    Attributes:
        logit_difference: the largest, as a fraction of the standard deviation of torch's logits.
        label_agreement: fraction of voxels whose highest class is the same.
    """

    logit_difference: float
    label_agreement: float


@dataclass(frozen=True, kw_only=True)
class ConvertedModel:
    """A converted network, and how far it agrees with torch."""

    model: ov.Model
    agreement: RuntimeAgreement


def openvino_version() -> str | None:
    """Return the version of OpenVINO, or None where it is not installed; does not import it."""
    try:
        return version("openvino")
    except PackageNotFoundError:
        return None


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, and return the module.

    `import openvino` imports its conversion tool, which sends a usage event over the network and
    writes an identifier into the user's home folder. None in `sys.modules` makes an import of the
    telemetry package fail as if it were not installed, a case for which OpenVINO and NNCF have
    stubs. Nothing is written and no setting of the user changes. A program that imported OpenVINO
    itself before has decided for itself.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def openvino_core() -> ov.Core:
    """Return the process's OpenVINO core, which holds the plugins for each device."""
    global _core
    with _CORE_LOCK:
        if _core is None:
            _core = import_openvino().Core()
        return _core


_core: ov.Core | None = None
_CORE_LOCK = threading.Lock()
_TRACING_LOCK = threading.Lock()  # torch traces one network at a time


class OpenVinoNetwork:
    """A model of OpenVINO as a function of tensors, compiled once per size of its input.

    Several threads may call it; one computes at a time, on all cores.

    Args:
        model: takes (B, C, *spatial).
        precision: `float32` or `bfloat16`. An int8 model is computed with `float32`, in which its
            layers that are not quantised remain.

    Shapes:
        (B, C, *roi_size) → logits (B, classes, *size) float32.
    """

    def __init__(self, model: ov.Model, precision: str) -> None:
        self.model = model
        self._hints = {
            "PERFORMANCE_HINT": "LATENCY",  # all cores compute one window
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self._requests: dict[tuple[int, ...], ov.InferRequest] = {}
        # an infer request belongs to one caller at a time
        self._lock = threading.Lock()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        openvino = import_openvino()
        array = x.detach().to(torch.float32).contiguous().numpy()
        with self._lock:
            request = self._request(x.shape)
            _, *size = request.get_compiled_model().output(0).get_partial_shape()
            # a new tensor for each result: OpenVINO writes into the memory of the tensor
            result = torch.empty((len(x), *(n.get_length() for n in size)))
            request.set_input_tensor(openvino.Tensor(array, shared_memory=True))
            request.set_output_tensor(openvino.Tensor(result.numpy(), shared_memory=True))
            request.infer()
        return result

    def precision(self, x: torch.Tensor) -> str:
        """Return the type that the processor computes in, for inputs with the shape of `x`.

        OpenVINO computes in float32 where a processor does not have the requested type.
        """
        with self._lock:
            compiled = self._request(x.shape).get_compiled_model()
        for operation in compiled.get_runtime_model().get_ordered_ops():
            info = operation.get_rt_info()
            if "runtimePrecision" in info and info["runtimePrecision"].astype(str) in INT8_TYPES:
                return "int8"
        name: str = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        return OPENVINO_TYPES.get(name, name)

    def _request(self, shape: torch.Size) -> ov.InferRequest:
        # slices come in batches of many sizes, for which a model of any batch size is compiled
        batch = -1 if len(shape) == 4 else shape[0]
        key = (batch, *shape[1:])
        if key not in self._requests:
            sized = self.model.clone()
            sized.reshape({0: list(key)})
            compiled = openvino_core().compile_model(sized, "CPU", self._hints)
            self._requests[key] = compiled.create_infer_request()
        return self._requests[key]


def convert_to_openvino(network: nn.Module, spec: Spec) -> ov.Model:
    """Return OpenVINO's model of a torch network, in float32."""
    openvino = import_openvino()
    any_size = [-1 for _ in spec.roi_size]
    with _TRACING_LOCK, warnings.catch_warnings():
        # torch warns that sizes are traced as constants, which they are: windows have one size
        warnings.simplefilter("ignore")
        model: ov.Model = openvino.convert_model(
            network.eval(),
            example_input=noise_window(spec),
            input=[-1, len(spec.channels), *any_size],
        )
    return model


def cached_model(network: nn.Module, spec: Spec, precision: str) -> ConvertedModel:
    """Return OpenVINO's model of a network from the user's cache, converted where it is missing.

    The key of an entry contains weights, spec, precision, versions and processor. Several processes
    may make an entry at once: the first one to finish stays. Where there can be no cache folder,
    the network is converted each time, with a warning.

    Args:
        network: in torch.
        spec: of the network.
        precision: that the model is compared with torch in, `float32` or `bfloat16`.
    """
    folder = cache_folder() / _cache_key(network, spec, precision)
    if not _report_file(folder).is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
        except OSError as error:
            warnings.warn(
                f"{folder.parent}: no cache there ({error.strerror}): "
                "the network is converted each time",
                stacklevel=2,
            )
            return _convert_and_compare(network, spec, precision)
        try:
            _write_entry(temporary, _convert_and_compare(network, spec, precision))
            _publish(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return ConvertedModel(
        model=openvino_core().read_model(_model_file(folder)),
        agreement=json.loads(_report_file(folder).read_text("utf-8")),
    )


def _convert_and_compare(network: nn.Module, spec: Spec, precision: str) -> ConvertedModel:
    model = convert_to_openvino(network, spec)
    converted = OpenVinoNetwork(model, precision)
    return ConvertedModel(
        model=model, agreement=compare_runtimes(network, converted, noise_window(spec))
    )


def _model_file(folder: Path) -> Path:
    return folder / "model.xml"


def _report_file(folder: Path) -> Path:
    return folder / "report.json"


def _write_entry(folder: Path, converted: ConvertedModel) -> None:
    """Write a cache entry; the report comes last, because it marks the entry as whole."""
    # half-precision weights would be smaller, and others
    import_openvino().save_model(converted.model, _model_file(folder), compress_to_fp16=False)
    report = json.dumps(converted.agreement, indent=1)
    _report_file(folder).write_text(report, encoding="utf-8")


def _publish(temporary: Path, folder: Path) -> None:
    """Rename a folder to its final name; where another process was first, its folder stays."""
    try:
        os.replace(temporary, folder)
    except OSError:
        if not _report_file(folder).is_file():
            raise


def compare_runtimes(
    network: nn.Module, other: NetworkFunction, x: torch.Tensor
) -> RuntimeAgreement:
    """Return how far another runtime agrees with torch on one window.

    Args:
        network: in torch.
        other: the same network in the other runtime.
        x: (1, C, *roi_size).
    """
    with torch.inference_mode():
        expected, found = network.eval()(x), other(x)
    scale = max(float(expected.std()), 1e-6)  # a constant output has a deviation of 0
    return RuntimeAgreement(
        logit_difference=float((expected - found).abs().max()) / scale,
        label_agreement=float((expected.argmax(1) == found.argmax(1)).double().mean()),
    )


def disagreement(agreement: RuntimeAgreement, precision: str) -> str | None:
    """Return why a runtime must not be used, or None where it agrees with torch.

    Args:
        agreement: from `compare_runtimes`.
        precision: `float32` or `bfloat16`, which gives the tolerance.
    """
    expected = TOLERANCES[precision]
    if (
        agreement["logit_difference"] <= expected.logit_difference
        and agreement["label_agreement"] >= expected.label_agreement
    ):
        return None
    return (
        f"its {precision} logits differ from torch's by {agreement['logit_difference']:.2g} "
        f"standard deviations (expected at most {expected.logit_difference:g}), "
        f"{agreement['label_agreement']:.2%} of labels agree "
        f"(expected {expected.label_agreement:.2%})"
    )


def weights_hash(network: nn.Module, spec: Spec) -> str:
    """Return the SHA-256 of a network's weights and its spec, hexadecimal."""
    digest = hashlib.sha256(repr(spec).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Return where converted networks are kept.

    It is $VOLSEG_CACHE where that is set, else `volseg` in the user's cache folder.
    """
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    if os.environ.get("XDG_CACHE_HOME"):
        caches = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "darwin":
        caches = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        caches = Path(os.environ.get("LOCALAPPDATA", Path.home()))
    else:
        caches = Path.home() / ".cache"
    return caches / "volseg"


def _cache_key(network: nn.Module, spec: Spec, precision: str) -> str:
    parts = (
        CACHE_LAYOUT,
        weights_hash(network, spec),
        precision,
        version("openvino"),
        torch.__version__,
        openvino_core().get_property("CPU", "FULL_DEVICE_NAME"),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def noise_window(spec: Spec) -> torch.Tensor:
    """Return a small window (1, C, *spatial) of smooth noise, the same each time."""
    size = []
    for roi, *strides in zip(spec.roi_size, *spec.strides, strict=True):
        valid = valid_size_near(strides, NOISE_VOXELS, padding=spec.network.padding)
        size.append(min(roi, valid))
    coarse = torch.randn(
        (1, len(spec.channels), *(max(1, n // NOISE_COARSENESS) for n in size)),
        generator=torch.Generator().manual_seed(0),
    )
    mode = "trilinear" if spec.spatial_dims == 3 else "bilinear"
    return functional.interpolate(coarse, size=size, mode=mode, align_corners=False)
