"""Small bundles in the forms of MONAI's model zoo, and MONAI's own run of them."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import yaml
from monai.bundle import run
from monai.networks.nets import UNet
from phantom import oblique, save

SCRIPT = '''
from monai.transforms import MapTransform

class Scale(MapTransform):
    """A transform of the bundle's own."""

    def __init__(self, keys, factor):
        super().__init__(keys)
        self.factor = factor

    def __call__(self, data):
        return {**data, **{key: data[key] * self.factor for key in self.keys}}
'''
CUDA = "$torch.device('cuda')"


def transform(name: str, keys: Any = "pred", **arguments: Any) -> dict[str, Any]:
    """Return a part of a configuration."""
    return {"_target_": name, "keys": keys, **arguments}


def invert(**arguments: Any) -> dict[str, Any]:
    """Return the usual `Invertd`."""
    usual = {"transform": "@preprocessing", "orig_keys": "image", "nearest_interp": False}
    return transform("Invertd", **(usual | arguments))


def zoo_config(channels: int = 1, labels: int = 3) -> dict[str, Any]:
    """Return a configuration like that of the zoo's spleen bundle."""
    return {
        "imports": ["$import glob"],
        "bundle_root": ".",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": {
            "_target_": "UNet",
            "spatial_dims": 3,
            "in_channels": channels,
            "out_channels": labels,
            "channels": [4, 8],
            "strides": [2],
        },
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                transform("LoadImaged", "image"),
                transform("EnsureChannelFirstd", "image"),
                transform("Orientationd", "image", axcodes="RAS"),
                transform("Spacingd", "image", pixdim=[1.5, 1.5, 2.0], mode="bilinear"),
                transform("NormalizeIntensityd", "image"),
                transform("EnsureTyped", "image"),
            ],
        },
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': i} for i in glob.glob('/nowhere/*.nii.gz')]",
            "transform": "@preprocessing",
        },
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@dataset",
            "batch_size": 1,
            "shuffle": True,
            "num_workers": 4,
        },
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": [16, 16, 16],
            "sw_batch_size": 2,
            "overlap": 0.5,
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                transform("Activationsd", softmax=True),
                invert(),
                transform("AsDiscreted", argmax=True),
                transform("SaveImaged", output_dir="@output_dir", output_postfix="trans"),
            ],
        },
        "handlers": [{"_target_": "StatsHandler", "iteration_log": False}],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
            "amp": True,
        },
        "checkpointloader": {
            "_target_": "CheckpointLoader",
            "load_path": "$@bundle_root + '/models/model.pt'",
            "load_dict": {"model": "@network"},
        },
        "initialize": ["$@checkpointloader(@evaluator)"],
        "run": ["$@evaluator.run()"],
    }


def metadata(channels: Mapping[str, str], labels: Mapping[str, str], count: int) -> dict[str, Any]:
    """Return what the metadata of a bundle say of its network."""
    image = {"num_channels": len(channels), "channel_def": dict(channels)}
    pred = {"num_channels": count, "channel_def": dict(labels)}
    return {
        "version": "0.1.0",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": pred}},
    }


def zoo_bundle(root: Path, form: str) -> Path:
    """Write a bundle in one of the zoo's forms, with random weights, and return its folder."""
    config = zoo_config(channels=2 if form in ("channels", "keys") else 1)
    described = metadata({"0": "image"}, {"0": "background", "1": "near", "2": "far"}, 3)
    if form == "channels":
        described = metadata({"0": "T1w", "1": "FLAIR"}, {"0": "background", "1": "lesion"}, 3)
    if form in ("sigmoid", "masks"):
        described = metadata({"0": "image"}, {"0": "core", "1": "whole", "2": "rim"}, 3)
    CHANGES.get(form, _nothing)(config)
    return write_bundle(
        root,
        config,
        described,
        weights="net.pt" if form == "handler" else "model.pt",
        name="inference.yaml" if form == "yaml" else "inference.json",
    )


def _nothing(config: dict[str, Any]) -> None:
    """The spleen bundle's form."""


def _handler(config: dict[str, Any]) -> None:
    loader = config.pop("checkpointloader") | {"load_path": "$@bundle_root + '/models/net.pt'"}
    config["handlers"].insert(0, loader)
    del config["initialize"]
    config["evaluating"] = config.pop("run")


def _keys(config: dict[str, Any]) -> None:
    keys = ["artery", "vein"]
    steps = config["preprocessing"]["transforms"]
    steps[0] = transform("LoadImaged", [*keys, "label"])
    for step in steps[1:4]:
        step["keys"] = keys
    steps.insert(4, transform("ConcatItemsd", keys) | {"name": "image"})
    config["postprocessing"]["transforms"][1]["orig_keys"] = "artery"


def _masks(config: dict[str, Any]) -> None:
    steps = config["postprocessing"]["transforms"]
    steps[0] = transform("Activationsd", sigmoid=True)
    steps[2] = transform("AsDiscreted", threshold=0.5)


def _sigmoid(config: dict[str, Any]) -> None:
    _masks(config)
    fold = "$lambda x: torch.where(x[[2]] > 0, 4, torch.where(x[[0]] > 0, 1, 0))"
    config["postprocessing"]["transforms"].insert(3, transform("Lambdad") | {"func": fold})


def _slices(config: dict[str, Any]) -> None:
    config["network_def"]["spatial_dims"] = 2
    config["inferer"] = {"_target_": "SliceInferer", "roi_size": [16, 16], "spatial_dim": 2}


def _scripts(config: dict[str, Any]) -> None:
    own = {"_target_": "scripts.own.Scale", "keys": "image", "factor": 0.5}
    config["preprocessing"]["transforms"].insert(5, own)


def _crop(config: dict[str, Any]) -> None:
    crop = transform("CropForegroundd", "image", source_key="image")
    config["preprocessing"]["transforms"].insert(4, crop)


def _labels(config: dict[str, Any]) -> None:
    steps = config["postprocessing"]["transforms"]
    steps[1:3] = [transform("AsDiscreted", argmax=True), invert(nearest_interp=True)]


def _argmax(config: dict[str, Any]) -> None:
    steps = config["postprocessing"]["transforms"]
    steps[0:3] = [transform("AsDiscreted", argmax=True), invert()]


def _cuda(config: dict[str, Any]) -> None:
    config["spare"] = {"_target_": "torch.zeros", "size": [1], "device": CUDA}
    config["evaluator"]["_requires_"] = ["@spare"]


CHANGES: Mapping[str, Callable[[dict[str, Any]], None]] = {
    "handler": _handler,
    "keys": _keys,
    "masks": _masks,
    "sigmoid": _sigmoid,
    "slices": _slices,
    "scripts": _scripts,
    "crop": _crop,
    "labels": _labels,
    "argmax": _argmax,
    "cuda": _cuda,
}


def write_bundle(
    root: Path,
    config: Mapping[str, Any],
    described: Mapping[str, Any],
    *,
    weights: str = "model.pt",
    name: str = "inference.json",
) -> Path:
    """Write a bundle with random weights, and return its folder."""
    for folder in ("configs", "models", "scripts"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    text = json.dumps(config) if name.endswith("json") else yaml.safe_dump(dict(config))
    (root / "configs" / name).write_text(text)
    (root / "configs" / "metadata.json").write_text(json.dumps(described))
    (root / "scripts" / "__init__.py").write_text("")
    (root / "scripts" / "own.py").write_text(SCRIPT)
    arguments = {key: value for key, value in config["network_def"].items() if key[0] != "_"}
    torch.manual_seed(3)
    network = UNet(**arguments).eval()
    window = torch.randn(1, arguments["in_channels"], *[16] * arguments["spatial_dims"])
    with torch.no_grad():  # so that each label occurs
        logits = network(window)[0].flatten(1)
        biases = [value for key, value in network.named_parameters() if key.endswith("bias")]
        last = [bias for bias in biases if len(bias) == arguments["out_channels"]][-1]
        last -= logits.mean(dim=1)
    torch.save(network.state_dict(), root / "models" / weights)
    return root


def zoo_images(folder: Path, form: str) -> list[str]:
    """Write the files of a case: oblique, anisotropic, all of them on one grid."""
    names = {"channels": ["c_T1w", "c_FLAIR"], "keys": ["c_artery", "c_vein"]}.get(form, ["c"])
    affine = oblique((1.2, 1.3, 2.4)) @ np.diag([-1.0, 1.0, 1.0, 1.0])
    paths = []
    for number, name in enumerate(names):
        noise = np.random.default_rng(number).normal(size=(23, 26, 14)).cumsum(0).cumsum(1)
        array = noise.astype(np.float32) + 40
        array[:3] = array[:, -4:] = 0
        paths.append(str(save(folder / f"{name}.nii.gz", nib.Nifti1Image(array, affine))))
    return paths


def quiet_run(**arguments: Any) -> None:
    """Run MONAI's `run`; its warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(**arguments)


def by_monai(root: Path, item: Mapping[str, Any], out: Path, **overrides: Any) -> Any:
    """Return the voxels that MONAI's own run of a bundle writes."""
    [config] = (root / "configs").glob("inference.*")
    names = json.loads(config.read_text()) if config.suffix == ".json" else ["run"]
    given = {"dataset::data": [dict(item)], "dataloader::num_workers": 0, "output_dir": str(out)}
    before = sys.path.copy()
    sys.path.insert(0, str(root))
    try:
        quiet_run(
            run_id="evaluating" if "evaluating" in names else "run",
            config_file=str(config),
            meta_file=str(root / "configs" / "metadata.json"),
            logging_file=False,
            bundle_root=str(root),
            **(given | overrides),
        )
    finally:
        sys.path[:] = before
        for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
            del sys.modules[name]
    [written] = out.rglob("*.nii.gz")
    return np.asarray(nib.load(written).dataobj)
