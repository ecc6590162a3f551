"""The network as it runs: in torch, or as OpenVINO made it of the same weights (two to three times faster on a CPU).

The conversion is done once a bundle, compared with torch, and kept in the user's cache folder.
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
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn import functional

from pipeline.config import Spec, valid_size_near
from pipeline.errors import ConfigError
from pipeline.networks import channels_last
from pipeline.types import PathOrStr

if TYPE_CHECKING:
    import openvino as ov

RuntimeName = Literal["auto", "torch", "openvino"]
Precision = Literal["auto", "float32", "bfloat16", "int8"]
NetworkFunction = Callable[[torch.Tensor], torch.Tensor]
RUNTIMES, PRECISIONS = ("auto", "torch", "openvino"), ("auto", "float32", "bfloat16", "int8")
CACHE_VARIABLE = "VOLSEG_CACHE"
INT8 = "model_int8.xml"  # in the bundle's models/
LAYOUT, NOISE_VOXELS = (
    "2",
    48,
)  # of a cache entry, changed with what is stored; of the window it is checked on, along an axis
# largest difference of logits as a fraction of their standard deviation, least agreement of labels
TOLERANCE = {"float32": (0.01, 0.9995), "bfloat16": (0.5, 0.98)}


class Runtime(nn.Module):
    """A network as it runs, with the network's own inputs and outputs; made ready when it is first used.

    Args:
        network: in torch, with the weights that it has when first used.
        spec: what it was trained to see.
        bundle_root: the bundle's folder, for its int8 model.
        runtime: `torch`, `openvino`, or `auto`: OpenVINO on a CPU where it is installed and agrees with torch, else torch.
        precision: of the arithmetic; `auto` is float32 on a CPU and torch's float16 autocast on a GPU. `int8` needs the
            bundle's int8 model, which `volseg export` makes.

    Shapes: (B, C, *roi_size) → logits (B, classes, *roi_size) float32.

    Raises:
        ConfigError: on construction, values that are none of the above; on first use, a runtime or precision that is not there.
    """

    def __init__(
        self,
        network: nn.Module,
        spec: Spec,
        *,
        bundle_root: PathOrStr = ".",
        runtime: RuntimeName = "auto",
        precision: Precision = "auto",
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("runtime", runtime, RUNTIMES),
            ("precision", precision, PRECISIONS),
        ):
            if value not in choices:
                raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        if runtime == "torch" and precision == "int8":
            raise ConfigError("--precision int8 runs in OpenVINO: leave out --runtime torch")
        self.network, self.spec, self.root = network, spec, Path(bundle_root)
        self.runtime, self.precision = runtime, precision
        self._ready: NetworkFunction | None = None
        self.description = ""

    def forward(self, x: torch.Tensor) -> Any:
        if self._ready is None:
            self._ready, self.description = self._prepare(x)
        return self._ready(x)

    def _prepare(self, x: torch.Tensor) -> tuple[NetworkFunction, str]:
        """What runs, and its name and precision."""
        if x.device.type != "cpu" or self.runtime == "torch":
            if self.runtime == "openvino" or self.precision == "int8":
                raise ConfigError(
                    f"OpenVINO runs on the CPU here, the device is {x.device}: choose --device cpu"
                )
            precision = {"auto": "float32" if x.device.type == "cpu" else "float16"}.get(
                self.precision, self.precision
            )
            return torch_forward(self.network, precision), f"torch {precision}"
        if self.precision == "int8":
            return openvino_forward(self._int8(), "float32"), "openvino int8"
        precision = "float32" if self.precision == "auto" else self.precision
        model = self._converted(precision)
        if model is None:
            return torch_forward(self.network, precision), f"torch {precision}"
        return openvino_forward(model, precision), f"openvino {precision}"

    def _converted(self, precision: str) -> ov.Model | None:
        """OpenVINO's model of the network; None, with a warning, where torch must do and `auto` lets it."""
        reason = _missing()
        if not reason:
            model, reason = cached_model(self.network, self.spec, precision)
            if not reason:
                return model
        if self.runtime == "openvino":
            raise ConfigError(f"--runtime openvino: {reason}; choose --runtime torch")
        warnings.warn(f"the network runs in torch, not in OpenVINO: {reason}", stacklevel=2)
        return None

    def _int8(self) -> ov.Model:
        path = self.root / "models" / INT8
        how = f"make it by `volseg export {self.root} --to openvino --precision int8 --calibrate FOLDER`"
        if _missing():
            raise ConfigError(f"--precision int8: {_missing()}")
        if not path.is_file():
            raise ConfigError(f"--precision int8: {path} is not there; {how}")
        report = json.loads(path.with_suffix(".json").read_text("utf-8"))
        if report["weights_hash"] != weights_hash(self.network, self.spec):
            raise ConfigError(f"--precision int8: {path} was made of other weights; {how}")
        return _core().read_model(path)


def torch_forward(network: nn.Module, precision: str) -> NetworkFunction:
    """The network in torch: inference mode, channels last, autocast where the precision is not float32."""
    network, dtype = channels_last(network), getattr(torch, precision)

    def forward(x: torch.Tensor) -> Any:
        with (
            torch.inference_mode(),
            torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32),
        ):
            return network(
                x.to(memory_format=torch.channels_last_3d if x.ndim == 5 else torch.channels_last)
            )

    return forward


def openvino_forward(model: ov.Model, precision: str) -> NetworkFunction:
    """A model of OpenVINO as a function of tensors; compiled anew for each size of a window, and of a batch of volumes."""
    import openvino as ov

    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    requests: dict[tuple[int, ...], ov.InferRequest] = {}

    def forward(x: torch.Tensor) -> torch.Tensor:
        array = x.detach().to(torch.float32).contiguous().numpy()
        shape = (
            -1 if x.ndim == 4 else len(x),
            *x.shape[1:],
        )  # slices come in batches of many sizes
        if shape not in requests:
            sized = model.clone()
            sized.reshape({0: list(shape)})
            requests[shape] = _core().compile_model(sized, "CPU", hints).create_infer_request()
        request = requests[shape]
        _, *size = request.get_compiled_model().output(0).get_partial_shape()
        result = torch.empty((len(x), *(n.get_length() for n in size)))
        request.set_input_tensor(ov.Tensor(array, shared_memory=True))
        request.set_output_tensor(ov.Tensor(result.numpy(), shared_memory=True))
        request.infer()
        return result

    return forward


def convert_to_openvino(network: nn.Module, spec: Spec) -> ov.Model:
    """OpenVINO's model of a torch network, in float32."""
    import openvino as ov

    with _TRACING, warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # torch warns that sizes are traced as constants: windows have one size
        return ov.convert_model(
            network.eval(),
            example_input=noise_window(spec),
            input=[-1, len(spec.channels), *(-1 for _ in spec.roi_size)],
        )


def cached_model(network: nn.Module, spec: Spec, precision: str) -> tuple[ov.Model, str]:
    """OpenVINO's model of the network from the user's cache, and why it must not be used: '' where it agrees with torch.

    The entry goes by weights, spec, versions and processor. Several processes may make it at once: the first one stays.
    """
    folder = cache_folder() / _key(network, spec, precision)
    if not (folder / "report.json").is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
        except OSError as error:
            warnings.warn(
                f"{folder.parent}: no cache there ({error.strerror}): the network is converted each time",
                stacklevel=2,
            )
            model = convert_to_openvino(network, spec)
            return model, disagreement(
                compare_runtimes(network, openvino_forward(model, precision), noise_window(spec)),
                precision,
            )
        try:
            _make(temporary, network, spec, precision)
            _settle(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    report = json.loads((folder / "report.json").read_text("utf-8"))
    return _core().read_model(folder / "model.xml"), disagreement(report, precision)


def _make(folder: Path, network: nn.Module, spec: Spec, precision: str) -> None:
    import openvino as ov

    model = convert_to_openvino(network, spec)
    ov.save_model(model, folder / "model.xml", compress_to_fp16=False)
    report = compare_runtimes(network, openvino_forward(model, precision), noise_window(spec))
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def _settle(temporary: Path, folder: Path) -> None:
    """Renames a folder to its final name; where another process was first, its folder stays."""
    try:
        os.replace(temporary, folder)
    except OSError:
        if not (folder / "report.json").is_file():
            raise


def compare_runtimes(
    network: nn.Module, other: NetworkFunction, x: torch.Tensor
) -> dict[str, float]:
    """How far another runtime's logits lie from torch's in one window (1, C, *roi_size).

    Returns:
        `logit_difference` (the largest, as a fraction of the standard deviation of torch's logits) and `label_agreement`
        (the fraction of voxels whose highest class is the same).
    """
    with torch.inference_mode():
        ours, theirs = network.eval()(x), other(x)
    scale = max(float(ours.std()), 1e-6)
    return {
        "logit_difference": float((ours - theirs).abs().max()) / scale,
        "label_agreement": float((ours.argmax(1) == theirs.argmax(1)).double().mean()),
    }


def disagreement(report: dict[str, float], precision: str) -> str:
    """Why a runtime must not be used, from what `compare` found; '' where it may."""
    difference, agreement = TOLERANCE[precision]
    if report["logit_difference"] <= difference and report["label_agreement"] >= agreement:
        return ""
    return (
        f"its {precision} logits differ from torch's by {report['logit_difference']:.2g} standard deviations (expected at most "
        f"{difference:g}), {report['label_agreement']:.2%} of labels agree (expected {agreement:.2%})"
    )


def weights_hash(network: nn.Module, spec: Spec) -> str:
    """SHA-256 of a network's weights and its spec, hexadecimal."""
    digest = hashlib.sha256(repr(spec).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where converted networks are kept: $VOLSEG_CACHE, else `volseg` in the user's cache folder."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    home = {
        "darwin": Path.home() / "Library" / "Caches",
        "win32": Path(os.environ.get("LOCALAPPDATA", Path.home())),
    }
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or home.get(sys.platform, Path.home() / ".cache"))
        / "volseg"
    )


def _key(network: nn.Module, spec: Spec, precision: str) -> str:
    processor = _core().get_property("CPU", "FULL_DEVICE_NAME")
    parts = (
        LAYOUT,
        weights_hash(network, spec),
        precision,
        version("openvino"),
        torch.__version__,
        processor,
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def noise_window(spec: Spec) -> torch.Tensor:
    """A small window (1, C, *spatial) of smooth noise, always the same; a whole one takes gigabytes in torch."""
    along = zip(spec.roi_size, zip(*spec.strides, strict=True), strict=True)
    size = [
        min(roi, valid_size_near(strides, NOISE_VOXELS, padding=spec.network.padding))
        for roi, strides in along
    ]
    coarse = torch.randn(
        (1, len(spec.channels), *(max(1, n // 4) for n in size)),
        generator=torch.Generator().manual_seed(0),
    )
    mode = "trilinear" if spec.spatial_dims == 3 else "bilinear"
    return functional.interpolate(coarse, size=size, mode=mode, align_corners=False)


def _missing() -> str:
    try:
        version("openvino")
    except PackageNotFoundError:
        return "openvino is not installed (`pip install openvino`)"
    return ""


def _core() -> ov.Core:
    import openvino as ov

    global _CORE
    if _CORE is None:
        _CORE = ov.Core()
    return _CORE


_CORE: ov.Core | None = None
_TRACING = threading.Lock()  # torch traces one network at a time
