"""A bundle's network as a file for other runtimes, with a report of its agreement with torch."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypedDict

import numpy as np
import torch
from monai.data.torchscript_utils import save_net_with_metadata
from torch import nn
from torch.nn import functional

from pipeline.bundle.inline_spec import wiring_with_spec
from pipeline.bundle.metadata import bundle_metadata
from pipeline.bundle.opening import find_bundle
from pipeline.config import BundlePaths, Spec, load_spec
from pipeline.errors import ConfigError
from pipeline.inference import (
    OpenVinoNetwork,
    RuntimeAgreement,
    compare_runtimes,
    compute_apart,
    convert_to_openvino,
    import_openvino,
    model_hashes,
    noise_window,
    openvino_core,
    weights_hash,
    window_grid,
)
from pipeline.io import find_cases, sha256, write_json
from pipeline.networks import build_network, load_weights
from pipeline.transforms import IMAGE, preprocessing
from pipeline.types import Case, NetworkFunction, PathOrStr, Volume

Format = Literal["openvino", "onnx", "torchscript"]
ExportPrecision = Literal["float32", "int8"]

FILE_NAMES: dict[Format, str] = {
    "openvino": "model.xml",
    "onnx": "model.onnx",
    "torchscript": "model.ts",
}
# Bounds on the time of calibration and comparison, which apply the network to every window. Many
# volumes with few windows each cover more scanners and contrasts than few volumes with many.
MAX_VOLUMES = 20
MAX_WINDOWS = 128
WINDOWS_PER_VOLUME = 8


class ExportReport(TypedDict):
    """The content of the JSON file that is written next to an exported network.

    Attributes:
        file: name of the network's file in the bundle's models/.
        precision: float32 or int8.
        weights_hash: SHA-256 of the weights and the spec that the network was exported from.
        sha256: name of each file that was written → its SHA-256.
        compared_on: the input of the comparison with torch, windows of volumes or noise.
        logit_difference: largest difference of logits, in standard deviations of torch's logits.
        label_agreement: fraction of voxels with the same label, 0 to 1; the mean over windows.
    """

    file: str
    precision: ExportPrecision
    weights_hash: str
    sha256: dict[str, str]
    compared_on: str
    logit_difference: float
    label_agreement: float


def export_bundle(
    bundle: PathOrStr,
    to: Format,
    *,
    precision: ExportPrecision = "float32",
    calibrate: Sequence[PathOrStr] = (),
) -> ExportReport:
    """Write a bundle's network into its models/ for another runtime, and return the report.

    The report is written next to the network, as a JSON file of the same name.

    Args:
        bundle: a folder, or the name of a shipped bundle.
        to: the format: `openvino` (.xml and .bin), `onnx` or `torchscript`.
        precision: `int8` quantises weights and activations after training by NNCF, for OpenVINO
            only.
        calibrate: files or folders of real volumes, of which at most 20, evenly spread, are used.
            int8 is calibrated on every other volume and compared with torch on the rest (on the
            same one if there is only one). Without volumes the comparison is on noise.

    Raises:
        ConfigError: a package that the format needs is not installed, or int8 without volumes.
        OpenVinoError: OpenVINO, with which the file is compared, crashes or refuses the network.
    """
    paths = BundlePaths(find_bundle(bundle))
    spec = load_spec(paths.spec)
    found = find_cases(calibrate, spec) if calibrate else []
    volumes = [case for case in found if "left_out" not in case]
    cases = _evenly_spread(volumes, MAX_VOLUMES) if calibrate else []
    if precision == "int8" and (to != "openvino" or not cases):
        raise ConfigError(
            "--precision int8 is for --to openvino, and needs --calibrate FOLDER with volumes "
            "like those to be segmented"
        )
    network = _load_network(paths, spec)
    held_out = cases[1::2] or cases
    if precision == "int8":
        path = paths.int8_model
        exported = _write_int8(network, spec, path, cases[::2])
    else:
        path = paths.models / FILE_NAMES[to]
        exported = _WRITERS[to](network, spec, path)
    if to == "torchscript":
        _add_configurations(paths)
    windows = _varied_windows(spec, held_out) if held_out else [noise_window(spec)]
    agreement = _compare(network, exported, windows)
    report = ExportReport(
        file=path.name,
        precision=precision,
        weights_hash=weights_hash(network, spec),
        sha256=model_hashes(path) if to == "openvino" else {path.name: sha256(path)},
        compared_on=f"windows of {len(held_out)} volumes" if held_out else "noise",
        logit_difference=agreement["logit_difference"],
        label_agreement=agreement["label_agreement"],
    )
    write_json(path.with_suffix(".json"), report)
    return report


def _evenly_spread(cases: Sequence[Case], count: int) -> Sequence[Case]:
    """Return at most `count` cases, spread over the whole list."""
    return cases[:: max(1, len(cases) // count)][:count]


def _load_network(paths: BundlePaths, spec: Spec) -> nn.Module:
    """Return a bundle's network with its weights, ready for inference."""
    network = build_network(spec)
    load_weights(network, paths.weights)
    return network.eval()


def _compare(
    network: nn.Module, exported: NetworkFunction, windows: Iterable[torch.Tensor]
) -> RuntimeAgreement:
    """Return the largest `logit_difference` over windows and their mean `label_agreement`."""
    found = [compare_runtimes(network, exported, window) for window in windows]
    return RuntimeAgreement(
        logit_difference=max(agreement["logit_difference"] for agreement in found),
        label_agreement=float(np.mean([agreement["label_agreement"] for agreement in found])),
    )


def _varied_windows(spec: Spec, cases: Sequence[Case]) -> Iterator[torch.Tensor]:
    """Yield windows (1, C, *roi_size) of preprocessed volumes, equally many of each volume.

    They are the windows with the largest standard deviation: windows of air show nothing of the
    range that the network's activations have in tissue.
    """
    transform = preprocessing(spec)
    per_volume = max(1, min(WINDOWS_PER_VOLUME, MAX_WINDOWS // max(1, len(cases))))
    for case in cases:
        windows = _all_windows(spec, transform({IMAGE: case["image"]})[IMAGE].as_tensor())
        windows.sort(key=lambda window: float(window.std()), reverse=True)
        yield from windows[:per_volume]


def _all_windows(spec: Spec, volume: Volume) -> list[torch.Tensor]:
    """Return the windows (1, C, *roi_size) that inference cuts a preprocessed volume into.

    Args:
        spec: with roi_size and overlap of the windows.
        volume: (C, X, Y, Z), padded with zeros to roi_size where it is smaller.
    """
    axis = spec.slice_dim
    # (1, C, X, Y, Z) for a network of volumes, else (slices, C, *the other two axes)
    batch = volume[None] if axis is None else volume.movedim(axis + 1, 0)
    padding: list[int] = []
    for size, roi in zip(batch.shape[2:], spec.roi_size, strict=True):
        lacking = max(0, roi - size)
        # torch pads the last axis first, so the pairs are in reverse order of the axes
        padding = [lacking // 2, lacking - lacking // 2, *padding]
    batch = functional.pad(batch, padding)
    windows = []
    starts = list(product(*window_grid(batch.shape[2:], spec.roi_size, spec.overlap).starts))
    for number in range(len(batch)):
        for start in starts:
            box = [slice(i, i + n) for i, n in zip(start, spec.roi_size, strict=True)]
            windows.append(batch[(slice(number, number + 1), slice(None), *box)])
    return windows


def _write_openvino(network: nn.Module, spec: Spec, path: Path) -> NetworkFunction:
    """Write the network as OpenVINO IR and return it as read back."""
    _require("openvino")
    ov = import_openvino()
    # float16 weights would change the logits, and the disk space is not worth that
    ov.save_model(convert_to_openvino(network, spec), path, compress_to_fp16=False)
    return _read_by_openvino(path, spec)


def _write_int8(
    network: nn.Module, spec: Spec, path: Path, cases: Sequence[Case]
) -> NetworkFunction:
    """Quantise the network to int8, write it as OpenVINO IR and return it as read back.

    Args:
        network: in torch, float32.
        spec: of the network.
        path: the .xml file.
        cases: the volumes that the ranges of the activations are measured on.
    """
    _require("openvino")
    _require("nncf")
    ov = import_openvino()  # before nncf, which would import it with its telemetry
    import nncf

    windows = [window.contiguous().numpy() for window in _varied_windows(spec, cases)]
    quantised = nncf.quantize(
        convert_to_openvino(network, spec),
        nncf.Dataset(windows),
        subset_size=len(windows),
        fast_bias_correction=False,  # slower, and closer to float32 (scripts/bench_int8.py)
        preset=nncf.QuantizationPreset.MIXED,
    )
    ov.save_model(quantised, path, compress_to_fp16=False)
    return _read_by_openvino(path, spec)


def _write_onnx(network: nn.Module, spec: Spec, path: Path) -> NetworkFunction:
    """Write the network as ONNX by torch's exporter and return it as read back by OpenVINO."""
    for package in ("onnx", "onnxscript", "openvino"):
        _require(package)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter itself uses what torch has deprecated
        torch.onnx.export(
            network,
            (noise_window(spec),),
            str(path),
            input_names=["image"],
            output_names=["pred"],
            external_data=False,
        )
    return _read_by_openvino(path, spec)


def _write_torchscript(network: nn.Module, spec: Spec, path: Path) -> NetworkFunction:
    """Write the network as TorchScript by tracing and return it as read back."""
    with warnings.catch_warnings(), torch.inference_mode():
        # torch warns that TorchScript is deprecated, and that traced sizes are constants
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(network, noise_window(spec))  # type: ignore[no-untyped-call]
        traced.save(str(path))
        loaded: NetworkFunction = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    return loaded


def _add_configurations(paths: BundlePaths) -> None:
    """Write the wiring and the metadata into the TorchScript file, as MONAI's exports do.

    MONAI Deploy reads both from there. The wiring holds the spec, because such a file is used
    without the bundle's folder.
    """
    path = paths.models / FILE_NAMES["torchscript"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that TorchScript is deprecated
        save_net_with_metadata(
            torch.jit.load(str(path)),  # type: ignore[no-untyped-call]
            str(path),
            meta_values=bundle_metadata(paths.folder),
            more_extra_files={
                "inference.json": json.dumps(wiring_with_spec(paths), indent=2).encode()
            },
        )


def _read_by_openvino(path: Path, spec: Spec) -> NetworkFunction:
    """Return the network in a file, .xml or .onnx, as OpenVINO runs it in float32.

    Raises:
        OpenVinoError: OpenVINO crashes, or refuses the network.
    """
    model = openvino_core().read_model(path)
    with TemporaryDirectory(prefix="volseg-") as folder:
        compute_apart(model, noise_window(spec), "float32", Path(folder))
    return OpenVinoNetwork(model, "float32")


def _require(package: str) -> None:
    """Raise a ConfigError if a package is not installed."""
    if find_spec(package) is None:
        raise ConfigError(f"{package} is not installed; `pip install {package}`")


_WRITERS: dict[Format, Callable[[nn.Module, Spec, Path], NetworkFunction]] = {
    "openvino": _write_openvino,
    "onnx": _write_onnx,
    "torchscript": _write_torchscript,
}
