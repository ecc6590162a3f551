"""A bundle's network as files that other runtimes load, each with a report of how far it agrees with torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pipeline.bundle.opening import find_bundle
from pipeline.config import Spec, load_spec
from pipeline.errors import ConfigError
from pipeline.inference import (
    INT8,
    NetworkFunction,
    compare_runtimes,
    convert_to_openvino,
    noise_window,
    openvino_forward,
    weights_hash,
    window_grid,
)
from pipeline.io import find_cases, write_json
from pipeline.networks import build_network
from pipeline.transforms import IMAGE, preprocessing
from pipeline.types import Case, PathOrStr

Target = Literal["openvino", "onnx", "torchscript"]
WINDOWS_PER_VOLUME = 8  # those with the largest spread of values: air says nothing
MAX_WINDOWS = 128
MAX_VOLUMES = 20
NAMES = {"openvino": "model.xml", "onnx": "model.onnx", "torchscript": "model.ts"}


def export_bundle(
    bundle: PathOrStr,
    to: Target,
    *,
    precision: Literal["float32", "int8"] = "float32",
    calibrate: Sequence[PathOrStr] = (),
) -> dict[str, Any]:
    """Writes a bundle's network into its models/ for another runtime, and beside it the report that is returned.

    Args:
        bundle: a folder, or the name of a bundle that ships.
        to: `openvino` (.xml and .bin), `onnx` or `torchscript`.
        precision: `int8` quantises weights and activations after training, by NNCF, in OpenVINO only.
        calibrate: files or folders of real volumes, of which some, evenly spread, are used: int8 is calibrated on windows of
            every other one and compared on windows of the rest (on the same where there is one); without any, the comparison
            is on noise.

    Returns:
        `file`, `precision`, `compared_on`, `weights_hash`, and of the comparison `logit_difference` (the largest, in standard
        deviations of torch's logits) and `label_agreement` (fraction of voxels).

    Raises:
        ConfigError: a target whose package is not installed, or int8 without volumes.
    """
    root = find_bundle(bundle)
    spec = load_spec(root / "configs" / "spec.yaml")
    cases = find_cases(calibrate, spec) if calibrate else []
    cases = cases[:: max(1, len(cases) // MAX_VOLUMES)][:MAX_VOLUMES]
    network = build_network(spec)
    network.load_state_dict(
        torch.load(root / "models" / "model.pt", map_location="cpu", weights_only=True)
    )
    network.eval()
    if precision == "int8" and (to != "openvino" or not cases):
        raise ConfigError(
            "--precision int8 is for --to openvino, and needs --calibrate FOLDER with volumes like those to come"
        )
    path = root / "models" / (INT8 if precision == "int8" else NAMES[to])
    forward = (
        _WRITERS[to](network, spec, path)
        if precision == "float32"
        else _int8(network, spec, path, cases[::2])
    )
    held_out = cases[1::2] or cases
    report: dict[str, Any] = {
        "file": path.name,
        "precision": precision,
        "weights_hash": weights_hash(network, spec),
        "compared_on": f"windows of {len(held_out)} volumes" if held_out else "noise",
        **_agreement(
            network, forward, _windows(spec, held_out) if held_out else iter([noise_window(spec)])
        ),
    }
    write_json(path.with_suffix(".json"), report)
    return report


def _agreement(
    network: torch.nn.Module, other: NetworkFunction, windows: Iterator[torch.Tensor]
) -> dict[str, float]:
    """The worst `logit_difference` of the windows, and their mean `label_agreement`."""
    found = [compare_runtimes(network, other, window) for window in windows]
    return {
        "logit_difference": max(one["logit_difference"] for one in found),
        "label_agreement": float(np.mean([one["label_agreement"] for one in found])),
    }


def _windows(spec: Spec, cases: Sequence[Case]) -> Iterator[torch.Tensor]:
    """Windows (1, C, *roi_size) of preprocessed volumes, those that vary most, equally many of each volume."""
    transform = preprocessing(spec)
    each = max(1, min(WINDOWS_PER_VOLUME, MAX_WINDOWS // max(1, len(cases))))
    for case in cases:
        image = transform({IMAGE: case["image"]})[IMAGE].as_tensor()
        image = (
            image[None] if spec.slice_dim is None else image.movedim(spec.slice_dim + 1, 0)
        )  # (volumes or slices, C, …)
        lack = [max(0, roi - n) for roi, n in zip(spec.roi_size, image.shape[2:], strict=True)]
        image = torch.nn.functional.pad(
            image, [side for n in reversed(lack) for side in (n // 2, n - n // 2)]
        )
        starts = window_grid(image.shape[2:], spec.roi_size, spec.overlap).starts
        boxes = [
            tuple(slice(i, i + n) for i, n in zip(start, spec.roi_size, strict=True))
            for start in product(*starts)
        ]
        places = [
            (slice(number, number + 1), slice(None), *box)
            for number in range(len(image))
            for box in boxes
        ]
        found = [image[place] for place in places]
        yield from sorted(found, key=lambda window: -float(window.std()))[:each]


def _openvino(network: torch.nn.Module, spec: Spec, path: Path) -> NetworkFunction:
    _need("openvino")
    import openvino as ov

    model = convert_to_openvino(network, spec)
    ov.save_model(model, path, compress_to_fp16=False)
    return openvino_forward(ov.Core().read_model(path), "float32")


def _int8(
    network: torch.nn.Module, spec: Spec, path: Path, cases: Sequence[Case]
) -> NetworkFunction:
    _need("openvino")
    _need("nncf")
    import nncf
    import openvino as ov

    windows = [window.contiguous().numpy() for window in _windows(spec, cases)]
    quantised = nncf.quantize(
        convert_to_openvino(network, spec),
        nncf.Dataset(windows),
        subset_size=len(windows),
        fast_bias_correction=False,  # closer to float32 (scripts/bench_int8.py)
        preset=nncf.QuantizationPreset.MIXED,
    )
    ov.save_model(quantised, path, compress_to_fp16=False)
    return openvino_forward(ov.Core().read_model(path), "float32")


def _onnx(network: torch.nn.Module, spec: Spec, path: Path) -> NetworkFunction:
    """ONNX through torch's exporter; read back by OpenVINO."""
    for package in ("onnx", "onnxscript", "openvino"):
        _need(package)
    import openvino as ov

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (noise_window(spec),),
            str(path),
            input_names=["image"],
            output_names=["pred"],
            external_data=False,
        )
    return openvino_forward(ov.Core().read_model(path), "float32")


def _torchscript(network: torch.nn.Module, spec: Spec, path: Path) -> NetworkFunction:
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        torch.jit.trace(network, noise_window(spec)).save(str(path))  # type: ignore[no-untyped-call]
        loaded: NetworkFunction = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    return loaded


def _need(package: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ConfigError(f"{package} is not installed; `pip install {package}`")


_WRITERS: dict[str, Callable[[torch.nn.Module, Spec, Path], NetworkFunction]] = {
    "openvino": _openvino,
    "onnx": _onnx,
    "torchscript": _torchscript,
}
