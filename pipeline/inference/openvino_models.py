"""A torch network as a model of OpenVINO: conversion, cache, comparison with torch, inference.

OpenVINO computes a U-Net two to three times faster than torch on a CPU. A network is converted
once, tried in a process of its own, compared with torch, and kept in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import nn
from torch.nn import functional

from pipeline.config import Spec, spec_fingerprint, valid_size_near
from pipeline.errors import OpenVinoError
from pipeline.inference.openvino_trial import first_output
from pipeline.inference.process_memory import release_freed_memory
from pipeline.io import sha256
from pipeline.log import LOGGER
from pipeline.types import NetworkFunction

if TYPE_CHECKING:
    import openvino as ov

CACHE_VARIABLE = "VOLSEG_CACHE"
# part of the key of a cache entry, to be changed with what an entry contains
CACHE_LAYOUT = "4"
# files of a cache entry; model.bin is the third. A network that OpenVINO cannot compute has a
# report only, with the reason as its `problem`
MODEL, REPORT = "model.xml", "report.json"
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
# what reading a cache entry raises that is incomplete, unreadable or changed
_DAMAGE = (OSError, RuntimeError, ValueError, KeyError, TypeError)
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
_released = threading.Event()  # whether a compiled model of this process was freed
_TRACING_LOCK = threading.Lock()  # torch traces one network at a time


def computes_bfloat16() -> bool:
    """Return whether OpenVINO computes in bfloat16 on this processor when it is asked to."""
    return "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def forks_can_compile() -> bool:
    """Return whether a process forked from this one can compile a model of OpenVINO.

    OpenVINO keeps the threads of a compiled model that was freed for the next one. A forked process
    does not have them, and would wait for them for ever. Where this is false, spawn.
    """
    return not _released.is_set()


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
        self._hints = compile_hints(precision)
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
            # or what lies between the layers, as large as several results, is held until the next
            # window; to allocate it again takes no time that could be measured
            request.get_compiled_model().release_memory()
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
        key = compiled_shape(shape)
        if key not in self._requests:
            sized = self.model.clone()
            sized.reshape({0: list(key)})
            compiled = openvino_core().compile_model(sized, "CPU", self._hints)
            if not self._requests:
                weakref.finalize(self, _released.set)
            self._requests[key] = compiled.create_infer_request()
        return self._requests[key]


def compile_hints(precision: str) -> dict[str, Any]:
    """Return what OpenVINO's `compile_model` is asked for.

    Args:
        precision: `float32` or `bfloat16`.
    """
    return {
        "PERFORMANCE_HINT": "LATENCY",  # all cores compute one window
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # pinned threads of several processes would all sit on the first cores
        "ENABLE_CPU_PINNING": False,
    }


def compute_apart(
    model: ov.Model,
    x: torch.Tensor,
    precision: str,
    folder: Path,
    shapes: Sequence[Sequence[int]] = (),
) -> torch.Tensor:
    """Return a model's output for one input, computed in a process of its own.

    Args:
        model: of OpenVINO; its files are written into `folder` and stay there.
        x: (1, C, *spatial).
        precision: `float32` or `bfloat16`.
        folder: where files may be written.
        shapes: other shapes of inputs that the model is compiled for; -1 for any size.

    Raises:
        OpenVinoError: the process crashed, did not end in time, or OpenVINO refuses the network.
        OSError, RuntimeError: the files cannot be written.
    """
    # half-precision weights would be smaller, and others
    import_openvino().save_model(model, folder / MODEL, compress_to_fp16=False)
    with tempfile.TemporaryDirectory(prefix=".trying-", dir=folder) as exchanged:
        return first_output(
            folder / MODEL, x, compile_hints(precision), shapes, folder=Path(exchanged)
        )


def compiled_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape that a model is compiled for, to compute inputs of a shape.

    Slices come in batches of many sizes, for which a model of any batch size is compiled.
    """
    return (-1 if len(shape) == 4 else shape[0], *shape[1:])


def convert_to_openvino(network: nn.Module, spec: Spec) -> ov.Model:
    """Return OpenVINO's model of a torch network, in float32."""
    any_size = [-1 for _ in spec.roi_size]
    return convert_by_tracing(network, noise_window(spec), [-1, len(spec.channels), *any_size])


def convert_by_tracing(network: nn.Module, example: torch.Tensor, shape: Sequence[int]) -> ov.Model:
    """Return OpenVINO's model of a torch network, in float32.

    OpenVINO's own tracing runs the network four times more to check itself, which takes four times
    as long and, with 105 classes, 5 GB.

    Args:
        network: in torch.
        example: (1, C, *spatial) input that the network is traced with.
        shape: of the model's input; -1 for any size.
    """
    openvino = import_openvino()
    with _TRACING_LOCK, warnings.catch_warnings(), torch.no_grad():
        # torch warns that sizes are traced as constants, which they are: windows have one size
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(  # type: ignore[no-untyped-call]
            network.eval(), example, check_trace=False, strict=False
        )
        model: ov.Model = openvino.convert_model(traced, input=list(shape))
        del traced
    release_freed_memory()  # 0.2 GB, with 105 classes
    return model


def cached_model(network: nn.Module, spec: Spec, precision: str) -> ConvertedModel:
    """Return OpenVINO's model of a network from the user's cache, converted where it is missing.

    The key of an entry contains weights, spec, precision, versions and processor. An entry whose
    files do not have the hashes in its report is made again, with a warning. Several processes may
    make an entry at once: the first one to finish stays. Where there can be no cache folder of the
    user's own, the network is converted each time, with a warning. A network that OpenVINO cannot
    compute has an entry as well, so that it is not tried again.

    Args:
        network: in torch.
        spec: of the network.
        precision: that the model is compared with torch in, `float32` or `bfloat16`.

    Raises:
        OpenVinoError: OpenVINO cannot compute the network.
    """
    entry = cache_folder() / _cache_key(network, spec, precision)
    problem = _prepare_cache(entry.parent)
    if problem is None:
        found = _checked_entry(entry)
        if found is not None:
            return found
    try:
        model = convert_to_openvino(network, spec)
    except Exception as error:  # whatever OpenVINO raises for an operation that it does not know
        raise OpenVinoError(f"OpenVINO cannot convert the network ({error})") from error
    tried = _Trial(model, network, spec, precision)
    if problem is None:
        problem = _store(tried, entry)
    if problem is None:
        return _read_entry(entry)  # its weights are mapped from the file, not copied
    warnings.warn(
        f"{entry.parent}: no cache there ({problem}): the network is converted each time",
        stacklevel=2,
    )
    with _folder_for_trial() as folder:
        return ConvertedModel(model=model, agreement=tried.agreement(folder))


@dataclass(frozen=True)
class _Trial:
    """A converted network that is to be tried, and its network in torch."""

    model: ov.Model
    network: nn.Module
    spec: Spec
    precision: str

    def agreement(self, folder: Path) -> RuntimeAgreement:
        """Write the model's files into a folder, and return how far it agrees with torch.

        OpenVINO computes in a process of its own, which also compiles the model for whole windows.

        Raises:
            OpenVinoError: it cannot compute the network.
            OSError, RuntimeError: the files cannot be written.
        """
        window = noise_window(self.spec)
        whole = compiled_shape((1, len(self.spec.channels), *self.spec.roi_size))
        computed = compute_apart(self.model, window, self.precision, folder, [whole])
        return compare_runtimes(self.network, lambda _: computed, window)


@contextlib.contextmanager
def _folder_for_trial() -> Iterator[Path]:
    """Yield a temporary folder for a trial; an OpenVinoError where there can be none."""
    try:
        with tempfile.TemporaryDirectory(prefix="volseg-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    except (OSError, RuntimeError) as error:  # OpenVINO's errors of a full disk are RuntimeErrors
        raise OpenVinoError(f"OpenVINO cannot be tried ({error})") from error


def _prepare_cache(folder: Path) -> str | None:
    """Make the cache folder if it is missing, and return why it cannot be used, None if it can.

    Whoever may write into it decides what the network computes, so it must be the user's own (or
    root's) and closed to others. A folder of the user's own that others may write to, as earlier
    releases made it under some umasks, is closed to them.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
        if os.name != "posix":
            return None
        if status.st_uid == os.getuid() and status.st_mode & WRITABLE_BY_OTHERS:
            LOGGER.warning("%s: other users could write there; it is yours alone now", folder)
            folder.chmod(stat.S_IMODE(status.st_mode) & ~WRITABLE_BY_OTHERS)
            status = folder.stat()
    except OSError as error:
        return error.strerror or str(error)
    return None if _is_private(status) else "it belongs to another user, or others may write to it"


def _is_private(status: os.stat_result) -> bool:
    """Return whether only the user and root can change a file or folder."""
    if os.name != "posix":
        return True
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & WRITABLE_BY_OTHERS


def _checked_entry(entry: Path) -> ConvertedModel | None:
    """Return the content of a cache entry, None if it is missing or damaged; log the damage.

    Raises:
        OpenVinoError: its network is one that OpenVINO cannot compute.
    """
    if not entry.exists():
        return None
    try:
        return _read_entry(entry)
    except _DAMAGE as error:
        LOGGER.warning(
            "%s: the converted network is damaged and is made again (%s: %s)",
            entry,
            type(error).__name__,
            error,
        )
        return None


def _read_entry(entry: Path) -> ConvertedModel:
    """Return the content of a cache entry.

    Raises:
        OpenVinoError: its network is one that OpenVINO cannot compute.
        OSError, RuntimeError, ValueError, KeyError, TypeError: it is damaged.
    """
    report = json.loads((entry / REPORT).read_text("utf-8"))
    if report["key"] != entry.name or not _is_private(entry.stat()):
        raise ValueError("it was made for another network, or by another user")
    if "problem" in report:
        raise OpenVinoError(f"{report['problem']}; delete {entry} to try again", lasting=True)
    model = read_verified_model(entry / MODEL, report["sha256"])
    agreement = RuntimeAgreement(
        logit_difference=float(report["logit_difference"]),
        label_agreement=float(report["label_agreement"]),
    )
    return ConvertedModel(model=model, agreement=agreement)


def read_verified_model(path: Path, expected: Mapping[str, str]) -> ov.Model:
    """Read a model of OpenVINO whose files have the hashes that were recorded when it was written.

    OpenVINO itself reads weights of any content and length without an error.

    Args:
        path: the .xml file; the weights are in the .bin file next to it.
        expected: name of each of the two files → SHA-256, from `model_hashes`.

    Raises:
        ValueError: a file has another hash.
        OSError: a file cannot be read.
        RuntimeError: OpenVINO cannot read the model.
    """
    for name, found in model_hashes(path).items():
        if found != expected[name]:
            raise ValueError(f"{name} has not the SHA-256 that was recorded when it was written")
    return openvino_core().read_model(path)


def model_hashes(path: Path) -> dict[str, str]:
    """Return the SHA-256 of both files of a model of OpenVINO, by their names.

    Args:
        path: the .xml file; the weights are in the .bin file next to it.
    """
    return {file.name: sha256(file) for file in (path, path.with_suffix(".bin"))}


def _store(tried: _Trial, entry: Path) -> str | None:
    """Try a network, write a cache entry and return why that failed, None if it did not.

    The entry appears under its name only when it is whole. A damaged one is moved out of its way:
    another process that reads it goes on with the files that it has open.

    Raises:
        OpenVinoError: OpenVINO cannot compute the network now, and may another time.
    """
    try:
        temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=entry.parent))
    except OSError as error:
        return error.strerror or str(error)
    try:
        made = temporary / "entry"
        made.mkdir(mode=0o700)
        _write_entry(made, tried, key=entry.name)
        if _is_damaged(entry):
            with contextlib.suppress(OSError):  # another process moved it first
                entry.rename(temporary / "damaged")
        _publish(made, entry)
    except (OSError, RuntimeError) as error:  # OpenVINO's errors of a full disk are RuntimeErrors
        return str(error)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return None


def _is_damaged(entry: Path) -> bool:
    """Return whether there is an entry that cannot be used; another process may have made it."""
    if not entry.exists():
        return False
    try:
        _read_entry(entry)
    except OpenVinoError:
        return False
    except _DAMAGE:
        return True
    return False


def _write_entry(folder: Path, tried: _Trial, *, key: str) -> None:
    """Write the files of a cache entry.

    Raises:
        OpenVinoError: OpenVINO cannot compute the network now, and may another time.
        OSError, RuntimeError: a file cannot be written.
    """
    report: dict[str, Any] = {"key": key}
    try:
        agreement = tried.agreement(folder)
    except OpenVinoError as error:
        if not error.lasting:
            raise
        for path in folder.iterdir():  # the model is of no use
            path.unlink()
        report["problem"] = str(error)
    else:
        report |= {**agreement, "sha256": model_hashes(folder / MODEL)}
    (folder / REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")


def _publish(made: Path, entry: Path) -> None:
    """Rename an entry to its final name; where another process was first, its entry stays."""
    try:
        made.rename(entry)
    except OSError:
        if _is_damaged(entry) or not entry.exists():
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
    """Return the SHA-256 of a network's weights and its spec, hexadecimal.

    The spec counts by its fingerprint, so that a new release leaves the hash as it is.
    """
    digest = hashlib.sha256(spec_fingerprint(spec).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Return where converted networks are kept.

    It is $VOLSEG_CACHE where that is set, else `volseg` in the user's cache folder. A user without
    a home folder has none: the path returned is one that cannot be made.
    """
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    try:
        return _user_caches() / "volseg"
    except RuntimeError:  # Path.home: no HOME, and no table of users lists the user
        return Path(os.devnull) / "volseg"


def _user_caches() -> Path:
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"])
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home()))
    return Path.home() / ".cache"


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
