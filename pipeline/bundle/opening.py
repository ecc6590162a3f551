"""A MONAI bundle: its folder, its wiring, its metadata; opened, filled and checked."""

from __future__ import annotations

import sys
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path

from monai.bundle import ConfigParser

from pipeline.errors import ConfigError, root_cause, unwrap
from pipeline.inference import Model, resolve_device
from pipeline.types import PathOrStr

CHECKOUT_BUNDLES = Path(__file__).parent.parent.parent / "bundles"
INSTALLED_BUNDLES = Path(sys.prefix) / "share" / "volseg" / "bundles"


def find_bundle(name: PathOrStr) -> Path:
    """The folder of a bundle, given as a path or by the name of one that ships.

    Raises:
        ConfigError: no such bundle; the message lists those that ship.
    """
    for path in (Path(name), CHECKOUT_BUNDLES / name, INSTALLED_BUNDLES / name):
        if (path / "configs" / "inference.yaml").is_file():
            return path
    shipped = sorted(
        p.parent.parent.name
        for root in (CHECKOUT_BUNDLES, INSTALLED_BUNDLES)
        for p in root.glob("*/configs/spec.yaml")
    )
    raise ConfigError(
        f"{name}: no such bundle; expected a folder with configs/inference.yaml, or one of {', '.join(shipped)}"
    )


def open_bundle(
    bundle: PathOrStr,
    *,
    device: str = "auto",
    overlap: float | None = None,
    volume: int | None = None,
    runtime: str = "auto",
    precision: str = "auto",
    max_memory: int | None = None,
    uncertainty: bool = False,
    labels_spacing: float | None = None,
) -> Model:
    """A bundle opened for inference, by its own wiring.

    Args:
        bundle: a folder, or the name of a bundle that ships.
        device: auto, cpu, cuda or mps.
        overlap: of windows, instead of the spec's.
        volume: which volume of 4D files, from 0.
        runtime: auto, torch or openvino; see `pipeline.runtime.Runtime`.
        precision: auto, float32, bfloat16 or int8; likewise.
        max_memory: bytes that the process may come to hold.
        uncertainty: whether each voxel's uncertainty is wanted.
        labels_spacing: of the label maps' voxels, mm, instead of each file's own.

    Raises:
        ConfigError: no such bundle, or one whose parts do not fit together.
    """
    root = find_bundle(bundle)
    parser = ConfigParser()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI warns at every read that configurations run code
        parser.read_config(root / "configs" / "inference.yaml")
    parser["bundle_root"] = str(root)
    parser["device"] = resolve_device(device)
    try:
        parser["dataset"]["data"] = []
        parser["inferer"]["overlap"] = overlap
        parser["preprocessing"].update(volume=volume, labels_spacing=labels_spacing)
        if uncertainty:
            parser["finish"]["uncertainty"] = True
        if (runtime, precision) != ("auto", "auto"):
            if "runtime" not in parser:
                raise ConfigError(
                    "its wiring has no `runtime`, so --runtime and --precision do not apply; refresh the bundle"
                )
            parser["runtime"].update(runtime=runtime, precision=precision)
        parser.get_parsed_content("initialize")
        model: Model = parser.get_parsed_content("model")
    except Exception as error:
        cause = textwrap.shorten(
            root_cause(error), 240, placeholder=" …"
        )  # torch lists every weight that does not fit
        raise unwrap(error) or ConfigError(
            f"{root}: cannot be opened: {cause}; try `volseg check {root}`"
        ) from error
    return replace(model, max_memory=max_memory, uncertainty=uncertainty)
