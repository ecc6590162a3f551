"""The network as it runs: in torch, or in OpenVINO with the same weights."""

from __future__ import annotations

import json
import threading
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from pipeline.config import BundlePaths, Spec
from pipeline.errors import ConfigError, OpenVinoError
from pipeline.inference.device import has_amx, processor_name
from pipeline.inference.forking import keep_forks_computing
from pipeline.inference.openvino_models import (
    OpenVinoNetwork,
    cached_model,
    disagreement,
    openvino_version,
    read_verified_model,
    weights_hash,
)
from pipeline.networks import channels_last
from pipeline.types import NetworkFunction, PathOrStr

if TYPE_CHECKING:
    import openvino as ov

RuntimeName = Literal["auto", "torch", "openvino"]
Precision = Literal["auto", "float32", "bfloat16", "int8"]
RUNTIMES: tuple[str, ...] = get_args(RuntimeName)
PRECISIONS: tuple[str, ...] = get_args(Precision)
# part of the labels of a test window on which bfloat16 has to agree with torch's float32, for
# `auto` to choose it
CLOSE_AGREEMENT = 0.99
NOT_INSTALLED = "openvino is not installed (`pip install openvino`)"


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeDescription:
    """What really computes a network, which `auto` and the processor decide.

    Attributes:
        runtime: `torch` or `openvino`.
        precision: of the arithmetic: `float32`, `float16`, `bfloat16` or `int8`.
        openvino_version: where OpenVINO computes, else None.
        device: such as `cpu` or `cuda:0`.
        processor: name of the CPU or GPU.
    """

    runtime: Literal["torch", "openvino"]
    precision: str
    openvino_version: str | None
    device: str
    processor: str


class _Prepared(NamedTuple):
    """What computes a network, and its description."""

    compute: NetworkFunction
    description: RuntimeDescription


class Runtime(nn.Module):
    """A network as it runs, with the inputs and outputs of the torch network.

    It is prepared when it is first called, for the device of that input. Several threads may call
    it. A copy or a pickled runtime is prepared again; a forked process uses what its parent
    prepared, as long as no thread of the parent was computing at the moment of the fork and
    `forks_can_compile()` is true.

    Args:
        network: in torch, with the weights that it has when it is first called.
        spec: of the network.
        bundle_root: the bundle's folder, for its int8 model.
        runtime: `torch`, `openvino`, or `auto`: OpenVINO on a CPU where it is installed, computes
            the network and agrees with torch, else torch.
        precision: of the arithmetic. `auto` is torch's float16 autocast on a GPU; on a CPU it is
            float32, or bfloat16 in OpenVINO where the processor has AMX and 99 % of the labels of a
            test window are the same. `int8` needs the bundle's int8 model, which `volseg export`
            makes.

    Shapes:
        (B, C, *roi_size) → logits (B, classes, *roi_size) float32.

    Raises:
        ConfigError: on construction, an unknown runtime or precision; on the first call, one that
            is not available.
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
        _check_choice("runtime", runtime, RUNTIMES)
        _check_choice("precision", precision, PRECISIONS)
        if runtime == "torch" and precision == "int8":
            raise ConfigError("--precision int8 runs in OpenVINO: leave out --runtime torch")
        self.network, self.spec = network, spec
        self.paths = BundlePaths(bundle_root)
        self.runtime, self.precision = runtime, precision
        keep_forks_computing()
        self._reset()

    def _reset(self) -> None:
        """Forget what was prepared."""
        self._prepared: _Prepared | None = None
        self._preparing = threading.Lock()

    @property
    def description(self) -> RuntimeDescription | None:
        """What really computes; None before the first call."""
        return self._prepared.description if self._prepared else None

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: neither locks nor OpenVINO's compiled models can be."""
        state = self.__dict__.copy()
        for name in ("_prepared", "_preparing"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._reset()

    def prepare(self, device: torch.device | str) -> RuntimeDescription:
        """Prepare for windows of the spec's roi_size, as the first call does, and describe it.

        Nothing is computed with the network but its comparison with torch, once per machine. What
        was prepared before stays. Several threads may call it.

        Args:
            device: where the windows will be.

        Raises:
            ConfigError: the runtime or the precision is not available.
        """
        window = torch.zeros(1, len(self.spec.channels), *self.spec.roi_size, device=device)
        return self._prepare_once(window).description

    def forward(self, x: torch.Tensor) -> Any:
        return self._prepare_once(x).compute(x)

    def _prepare_once(self, x: torch.Tensor) -> _Prepared:
        """Return what computes inputs like `x`, prepared by the first thread that asks for it."""
        prepared = self._prepared
        if prepared is not None:
            return prepared
        with self._preparing:
            if self._prepared is None:
                network = self._prepare(x.device)
                self._prepared = _Prepared(network, _describe(network, x))
            return self._prepared

    def _prepare(self, device: torch.device) -> TorchNetwork | OpenVinoNetwork:
        """Return what computes on a device."""
        if device.type != "cpu":
            if self.runtime == "openvino" or self.precision == "int8":
                raise ConfigError(
                    f"OpenVINO runs on the CPU here, the device is {device}: choose --device cpu"
                )
            precision = "float16" if self.precision == "auto" else self.precision
            return TorchNetwork(self.network, precision)
        if self.precision == "int8":
            return OpenVinoNetwork(self._int8_model(), "float32")
        if self.precision == "auto" and self.runtime != "torch" and has_amx():
            model = self._close_bfloat16_model()
            if model is not None:
                return OpenVinoNetwork(model, "bfloat16")
        precision = "float32" if self.precision == "auto" else self.precision
        model = None if self.runtime == "torch" else self._openvino_model(precision)
        if model is None:
            return TorchNetwork(self.network, precision)
        return OpenVinoNetwork(model, precision)

    def _close_bfloat16_model(self) -> ov.Model | None:
        """Return OpenVINO's model of the network if bfloat16 changes few labels, else None."""
        if openvino_version() is None:
            return None
        try:
            converted = cached_model(self.network, self.spec, "bfloat16")
        except OpenVinoError:
            return None
        is_close = converted.agreement["label_agreement"] >= CLOSE_AGREEMENT
        return converted.model if is_close else None

    def _openvino_model(self, precision: str) -> ov.Model | None:
        """Return OpenVINO's model of the network.

        Returns:
            None, with a warning, where it cannot be used and `auto` allows torch instead.
        """
        problem: str | None = NOT_INSTALLED
        if openvino_version() is not None:
            try:
                converted = cached_model(self.network, self.spec, precision)
            except OpenVinoError as error:
                problem = str(error)
            else:
                problem = disagreement(converted.agreement, precision)
                if problem is None:
                    return converted.model
        if self.runtime == "openvino":
            raise ConfigError(f"--runtime openvino: {problem}; choose --runtime torch")
        warnings.warn(f"the network runs in torch, not in OpenVINO: {problem}", stacklevel=2)
        return None

    def _int8_model(self) -> ov.Model:
        path = self.paths.int8_model
        remedy = (
            f"make it by `volseg export {self.paths.folder} --to openvino --precision int8 "
            "--calibrate FOLDER`"
        )
        if openvino_version() is None:
            raise ConfigError(f"--precision int8: {NOT_INSTALLED}")
        if not path.is_file():
            raise ConfigError(f"--precision int8: {path} is not there; {remedy}")
        try:
            report = json.loads(path.with_suffix(".json").read_text("utf-8"))
            made_of = report["weights_hash"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--precision int8: {path.with_suffix('.json')}, the report of its export, cannot "
                f"be read ({error}); {remedy}"
            ) from error
        if made_of != weights_hash(self.network, self.spec):
            raise ConfigError(f"--precision int8: {path} was made of other weights; {remedy}")
        try:
            return read_verified_model(path, report["sha256"])
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--precision int8: {path} is not as it was exported ({error}); {remedy}"
            ) from error


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _describe(network: TorchNetwork | OpenVinoNetwork, x: torch.Tensor) -> RuntimeDescription:
    is_openvino = isinstance(network, OpenVinoNetwork)
    return RuntimeDescription(
        runtime="openvino" if is_openvino else "torch",
        precision=network.precision(x),
        openvino_version=openvino_version() if is_openvino else None,
        device=str(x.device),
        processor=processor_name(x.device),
    )


class TorchNetwork:
    """A network as it runs in torch: no gradients, channels last, autocast below float32.

    Args:
        network: its kernels are brought into channels-last order in place.
        precision: a name of torch's, such as `bfloat16`.

    Shapes:
        (B, C, *roi_size) → logits (B, classes, *size).
    """

    def __init__(self, network: nn.Module, precision: str) -> None:
        self.network = channels_last(network)
        self.dtype: torch.dtype = getattr(torch, precision)

    def __call__(self, x: torch.Tensor) -> Any:
        layout = torch.channels_last_3d if x.ndim == 5 else torch.channels_last
        autocast = torch.autocast(
            x.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
        )
        # not in inference mode, whose tensors cannot be changed in place after it
        with torch.no_grad(), autocast:
            return self.network(x.to(memory_format=layout))

    def precision(self, x: torch.Tensor) -> str:
        """Return the type that convolutions are computed in, for any input."""
        return str(self.dtype).removeprefix("torch.")
