"""Trained models of nnU-Net 2 as complete bundles, which need no nnU-Net."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.bundle.imported import write_imported
from pipeline.bundle.nnunet_plans import DATASET, PLANS, spec_content
from pipeline.bundle.trust import check_plain
from pipeline.config import BundlePaths, Spec, parse_config
from pipeline.errors import ConfigError, ReadError
from pipeline.io import sha256
from pipeline.networks import build_network, from_nnunet, load_checkpoint
from pipeline.types import PathOrStr

ISENSEE_2021 = (
    "Isensee, Jaeger, Kohl, Petersen, Maier-Hein: nnU-Net: a self-configuring method for deep "
    "learning-based biomedical image segmentation. Nature Methods 18 (2021), "
    "doi:10.1038/s41592-020-01008-z"
)

FOLD, ALL_FOLDS = "fold_", "fold_all"
# files of a fold, the last state first: nnU-Net's own, and those of MONAI's conversion
LAST, BEST = ("checkpoint_final.pth", "model.pt"), ("checkpoint_best.pth", "best_model.pt")
MONAI_MODELS, MONAI_CHECKPOINT = "models", "nnunet_checkpoint.pth"
WEIGHTS, SETTINGS, TRAINER = "network_weights", "init_args", "trainer_name"
MIRROR_AXES = "inference_allowed_mirroring_axes"


@dataclass(frozen=True, kw_only=True, slots=True)
class NnUNetModel:
    """A trained model of nnU-Net, as its folder has it.

    Attributes:
        name: name of its dataset, for readers.
        configuration: such as `3d_fullres`.
        trainer: name of the class that trained it.
        checkpoints: name of each fold → its file of weights.
        mirror_axes: axes along which nnU-Net averages mirror images.
    """

    name: str
    configuration: str
    trainer: str
    checkpoints: dict[str, Path]
    mirror_axes: tuple[int, ...]


def import_nnunet(
    folder: PathOrStr,
    output: PathOrStr,
    *,
    folds: Sequence[str] = (),
    best: bool = False,
    mirror: bool = False,
) -> NnUNetModel:
    """Write a bundle with a trained model of nnU-Net and return what the model is.

    Several folds become an ensemble, whose logits are averaged as nnU-Net does.

    Args:
        folder: of the model, with plans.json, dataset.json and the folders of its folds; or a
            bundle from MONAI's `convert_nnunet_to_monai_bundle`.
        output: the bundle's folder, which must not contain a bundle.
        folds: numbers of folds, or `all`; none takes every fold that is there.
        best: whether the weights with the best validation score are taken, not the last ones.
        mirror: whether mirror images are averaged, as `nnUNetv2_predict` does by default.

    Raises:
        PipelineError: a file cannot be read, the model has a part that is not supported, or the
            output contains a bundle.
    """
    paths = BundlePaths(output)
    if paths.configs.exists():
        raise ConfigError(f"{paths.folder}: contains a bundle already; choose another folder")
    root = _model_folder(Path(folder))
    plans, dataset = _read_json(root / PLANS), _read_json(root / DATASET)
    checkpoints = _checkpoints(root, folds, best=best)
    weights, facts = _read_checkpoints(root, checkpoints)
    model = _described(plans, facts, checkpoints)
    content = spec_content(
        plans,
        dataset,
        model.configuration,
        members=len(checkpoints),
        mirror_axes=model.mirror_axes if mirror else (),
    )
    heads = _deep_outputs(weights[0], len(content["network"]["features"]))
    content["network"]["deep_supervision"] = heads
    check_plain(content, "spec")
    spec = parse_config(Spec, content, "spec")
    state = _state(spec, weights, model)
    files = ", ".join(
        f"{name}/{path.name} (SHA-256 {sha256(path)})" for name, path in checkpoints.items()
    )
    source = f"nnU-Net 2, {model.name}, {model.configuration}: {files}"
    write_imported(
        paths,
        spec=content,
        card=_card(model, source, str(dataset.get("file_ending", "NIfTI"))),
        run={"batch_size": 16 if spec.spatial_dims == 2 else 2, "learning_rate": 1e-3},
        state=state,
        source=source,
        readme=_readme(model, source, str(output), mirror=mirror),
    )
    return model


def is_nnunet_folder(path: PathOrStr) -> bool:
    """Return whether a path is a folder, which only models of nnU-Net are among checkpoints."""
    return Path(path).is_dir()


def _model_folder(folder: Path) -> Path:
    """Return the folder with the plans: the given one, or that of a bundle of MONAI's conversion.

    Raises:
        ConfigError: there is none, or several.
    """
    for candidate in (folder, folder / MONAI_MODELS):
        if (candidate / PLANS).is_file():
            return candidate
    if (folder.parent / PLANS).is_file():
        raise ConfigError(
            f"{folder}: is one fold; import its model {folder.parent} with --fold "
            f"{folder.name.removeprefix(FOLD)}"
        )
    inside = sorted(path.parent for path in folder.glob(f"*/{PLANS}"))
    found = ", ".join(str(path) for path in inside) or "none"
    raise ConfigError(
        f"{folder}: expected the folder of a trained model of nnU-Net 2, with {PLANS} and "
        f"{DATASET}; models inside: {found}"
    )


def _read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file.

    Raises:
        ReadError: it is missing or no mapping in JSON.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReadError(
            f"{path}: cannot be read ({error}); expected the JSON of nnU-Net"
        ) from error
    if not isinstance(content, dict):
        raise ReadError(f"{path}: expected a mapping, got {type(content).__name__}")
    return content


def _checkpoints(root: Path, folds: Sequence[str], *, best: bool) -> dict[str, Path]:
    """Return the file of weights of each fold.

    Raises:
        ConfigError: a fold or its file is missing.
    """
    there = sorted(path.name for path in root.glob(f"{FOLD}*") if path.is_dir())
    asked = [f"{FOLD}{fold}" for fold in dict.fromkeys(folds)]
    # a network of all cases is no member of a cross-validation
    names = asked or [name for name in there if name != ALL_FOLDS] or there
    wanted = BEST if best else (*LAST, *BEST)
    for file_name in wanted:
        files = {name: root / name / file_name for name in names}
        found = {name: path for name, path in files.items() if path.is_file()}
        # as in nnU-Net, a fold that is still being trained is left out unless it was asked for
        if found and (not asked or len(found) == len(asked)):
            return found
    raise ConfigError(
        f"{root}: expected one of the files {', '.join(wanted)} in {', '.join(names) or 'fold_0'}; "
        f"its folds are {', '.join(there) or 'none'}"
    )


def _read_checkpoints(
    root: Path, checkpoints: Mapping[str, Path]
) -> tuple[list[dict[str, torch.Tensor]], dict[str, Any]]:
    """Return the weights of each fold, and what else the first checkpoint holds.

    Raises:
        ReadError: a file cannot be read or is no checkpoint of nnU-Net.
    """
    weights: list[dict[str, torch.Tensor]] = []
    facts: dict[str, Any] = {}
    for path in checkpoints.values():
        content = load_checkpoint(path)
        found = content.pop(WEIGHTS, None) if isinstance(content, dict) else None
        if not isinstance(found, dict) or not all(map(torch.is_tensor, found.values())):
            raise ReadError(f"{path}: expected a checkpoint of nnU-Net 2, with {WEIGHTS}")
        weights.append(found)
        facts = facts or content
    if SETTINGS not in facts and (root / MONAI_CHECKPOINT).is_file():
        facts = load_checkpoint(root / MONAI_CHECKPOINT)
    return weights, facts


def _described(
    plans: Mapping[str, Any], facts: Mapping[str, Any], checkpoints: Mapping[str, Path]
) -> NnUNetModel:
    """Return what a model is.

    Raises:
        ReadError: the checkpoint does not name its configuration.
    """
    settings = facts.get(SETTINGS)
    if not isinstance(settings, Mapping) or "configuration" not in settings:
        first = next(iter(checkpoints.values()))
        raise ReadError(f"{first}: expected {SETTINGS} with a configuration, such as 3d_fullres")
    return NnUNetModel(
        name=str(plans.get("dataset_name", "unnamed dataset")),
        configuration=str(settings["configuration"]),
        trainer=str(facts.get(TRAINER, "unknown")),
        checkpoints=dict(checkpoints),
        mirror_axes=tuple(int(axis) for axis in facts.get(MIRROR_AXES) or ()),
    )


def _deep_outputs(weights: Mapping[str, torch.Tensor], levels: int) -> int:
    """Return the number of lower levels that have an output in a state dict of nnU-Net."""
    heads = {name.split(".seg_layers.")[1].split(".")[0] for name in weights if "seg_la" in name}
    return min(max(0, len(heads) - 1), levels - 2)


def _state(
    spec: Spec, weights: Sequence[Mapping[str, torch.Tensor]], model: NnUNetModel
) -> dict[str, torch.Tensor]:
    """Return the state dict of the bundle's network.

    Raises:
        ConfigError: the weights are those of another network than the plans describe.
    """
    levels, deep = len(spec.network.features), spec.network.deep_supervision
    state = {}
    for number, member in enumerate(weights):
        prefix = f"members.{number}." if len(weights) > 1 else ""
        for name, tensor in from_nnunet(member, levels, deep).items():
            state[prefix + name] = tensor
    try:
        build_network(spec).load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"the weights are not of the network in {PLANS}; the trainer {model.trainer} may build "
            f"another one, which is not supported: {reason}"
        ) from error
    return state


def _card(model: NnUNetModel, source: str, file_ending: str) -> dict[str, Any]:
    """Return what the bundle's card has in addition to that of every import."""
    return {
        "name": f"{model.name} ({model.configuration})",
        "description": f"A network of nnU-Net 2, imported from {source}.",
        "task": f"Segmentation, {model.name}",
        "data_source": model.name,
        "data_type": file_ending,
        "references": [ISENSEE_2021],
    }


def _readme(model: NnUNetModel, source: str, bundle: str, *, mirror: bool) -> str:
    """Return the text of docs/README.md."""
    mirrored = "Mirror images are averaged, as nnUNetv2_predict does by default."
    if not mirror:
        mirrored = (
            "Mirror images are not averaged: the labels are those of `nnUNetv2_predict "
            "--disable_tta`. Import with --mirror to average them, at up to 8 times the time."
        )
    sections = [
        f"# {model.name} ({model.configuration})",
        f"Imported from {source}. It was trained by {model.trainer}.",
        "The network, its preprocessing, windows and resampling are those of nnU-Net's plans, and "
        "nnU-Net is not needed to run it. Files of several channels are named as nnU-Net names "
        "them: case_0000.nii.gz, case_0001.nii.gz.",
        mirrored,
        f"```\nvolseg segment scans/ -o out/ -b {bundle}\n```",
    ]
    return "\n\n".join(sections) + "\n"
