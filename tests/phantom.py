"""Input of the tests: oblique images with unequal sizes, and small bundles with random weights."""

from __future__ import annotations

import importlib.util
import sys
from itertools import permutations, product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from pipeline.bundle.wiring import refresh_bundle
from pipeline.config.parser import parse_config
from pipeline.config.paths import BundlePaths
from pipeline.config.spec import Spec, load_spec
from pipeline.inference.invert import LabelInversion
from pipeline.inference.model import Model
from pipeline.inference.sliding_window import build_inferer
from pipeline.networks import build_unet, save_weights
from pipeline.transforms.preprocess import preprocessing
from pipeline.types import Affine, Array

# All sizes and spacings differ, so that no test passes with two axes exchanged.
SHAPE = (17, 24, 21)
SPACING = (0.9, 1.3, 2.1)  # mm
ORIENTATIONS = [
    "".join(directions)
    for axes in permutations(("RL", "AP", "SI"))
    for directions in product(*axes)
]
LABELS = {"background": 0, "front": 7, "back": 300}
CARD = {
    "name": "Tiny",
    "description": "Made-up weights for tests.",
    "task": "nothing",
    "authors": "the tests",
    "copyright": "none",
    "intended_use": "tests",
    "data_source": "noise",
    "data_type": "NIfTI",
    "references": ["none"],
    "eval_metrics": {"dice": 0.5},
    "changelog": {"0.1.0": "first"},
}
RUN = {"bundle": ".", "dataset": ".", "epochs": 2, "batch_size": 2, "learning_rate": 0.01}


def oblique(
    spacing: tuple[float, float, float] = SPACING,
    angles: tuple[float, float, float] = (9.0, -13.0, 6.0),
) -> Affine:
    """Return an affine rotated about all three axes by `angles`, degrees; it is closest to RAS."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * spacing
    affine[:3, 3] = (-11.0, 7.5, 23.25)
    return affine


def smooth(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> NDArray[np.float32]:
    """Return smooth blobs with noise; almost no two voxels have the same intensity."""
    random = np.random.default_rng(seed)
    blobs = gaussian_filter(random.normal(size=shape), 2.0)
    return np.asarray(100 + 300 * blobs + random.normal(size=shape), dtype=np.float32)


def nifti(
    array: Array | None = None, affine: Affine | None = None, *, codes: tuple[int, int] = (1, 1)
) -> nib.Nifti1Image:
    """Return an image in mm; `codes` are the codes of sform and qform."""
    affine = oblique() if affine is None else affine
    image = nib.Nifti1Image(smooth() if array is None else array, affine)
    image.set_sform(affine, code=codes[0])
    image.set_qform(affine, code=codes[1])
    image.header.set_xyzt_units("mm", "sec")
    return image


def save(path: Path, image: Any = None) -> Path:
    """Write an image, by default that of `nifti`, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nifti() if image is None else image, path)
    return path


def reorient(image: nib.Nifti1Image, axcodes: str) -> nib.Nifti1Image:
    """Return the same image stored in another order and direction of axes."""
    current = nib.io_orientation(image.affine)
    wanted = nib.orientations.axcodes2ornt(axcodes)
    return image.as_reoriented(nib.orientations.ornt_transform(current, wanted))


def dice(a: Array, b: Array) -> float:
    """Return the lowest Dice of all labels in either map."""
    values = set(np.unique(a)) | set(np.unique(b)) - {0}
    return min(
        2 * float(((a == v) & (b == v)).sum()) / float((a == v).sum() + (b == v).sum())
        for v in values
    )


def spec_content(dims: int, **changes: Any) -> dict[str, Any]:
    """Return the content of spec.yaml for a network of a few hundred weights.

    Its spacing is not that of the images, so that resampling is always part of a test.
    """
    content: dict[str, Any] = {
        "labels": dict(LABELS),
        "channels": ["T1w"],
        "spacing": [1.2, 1.1, 1.6],
        "roi_size": [16, 20, 12] if dims == 3 else [20, 12],
        "network": {"features": [4, 6], "norm": "instance"},
    }
    if dims == 2:
        content["slice_axis"] = "R"
    return content | changes


def make_bundle(
    folder: Path, dims: int = 3, *, seed: int = 0, run: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """Make a bundle with random weights and return its folder; its predictions have all labels."""
    configs = folder / "configs"
    configs.mkdir(parents=True)
    for name, content in {
        "spec": spec_content(dims, **changes),
        "card": CARD,
        "run": RUN | (run or {}),
    }.items():
        (configs / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    torch.manual_seed(seed)
    net = build_unet(load_spec(configs / "spec.yaml"))
    torch.nn.init.normal_(net.output.weight)
    torch.nn.init.zeros_(net.output.bias)
    save_weights(net, folder / "models" / "model.pt")
    paths = BundlePaths(folder)
    paths.readme.parent.mkdir()
    paths.readme.write_text("# Tiny\n\nMade-up weights for tests.\n")
    paths.licence.write_text("No licence: these weights are for tests.\n")
    refresh_bundle(folder)
    return folder


def parse_spec(dims: int = 3, **changes: Any) -> Spec:
    """Return the spec of the tiny bundles, with changes."""
    return parse_config(Spec, spec_content(dims, **changes), "spec")


def make_model(net: torch.nn.Module, tiny: Spec) -> Model:
    """Return a model with this network and the spec's preprocessing and inversion."""
    return Model(
        root=".",
        spec=tiny,
        preprocessing=preprocessing(tiny),
        network=net,
        inferer=build_inferer(tiny),
        inversion=LabelInversion(tiny),
        device=torch.device("cpu"),
    )


def load_script(name: str) -> Any:
    """Import scripts/<name>.py."""
    path = Path(__file__).parent.parent / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look up their module in sys.modules while it is executed.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def run_settings(bundle: Path, dataset: Path, **changes: Any) -> list[str]:
    """Return the settings of a short run as KEY=VALUE arguments of `volseg train`."""
    settings = {
        "dataset": dataset,
        "epochs": 4,
        "batch_size": 2,
        "learning_rate": 0.01,
        "ema_decay": 0.5,
        **changes,
    }
    return [f"bundle={bundle}", *(f"{key}={value}" for key, value in settings.items())]


class OneVoxelNetwork(torch.nn.Module):
    """A convolution with a receptive field of one voxel to each side: 2 channels, 3 classes."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        conv = torch.nn.Conv3d if dims == 3 else torch.nn.Conv2d
        self.layer = conv(2, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(x))
