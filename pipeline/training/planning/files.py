"""The files of a plan: the run's YAML, and a bundle without weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.bundle import PLACEHOLDER
from pipeline.config import BundlePaths
from pipeline.io import Layout, Problem, write_atomically, write_json
from pipeline.training.planning.choices import Choice, nested_values

LINE_WIDTH = 110  # characters
SPEC_HEADING = "The inputs and outputs of these weights. Changing any of it makes them invalid."
CARD_HEADING = "For readers of the bundle: complete it."


def write_plan(
    path: Path,
    run: Mapping[str, Any],
    choices: Sequence[Choice],
    splits: list[dict[str, list[str]]],
    layout: Layout,
    problems: Sequence[Problem] = (),
) -> None:
    """Write the YAML file of the run, and spec, card, splits and plan.json of its bundle.

    Args:
        path: YAML file of the run.
        run: the settings `bundle` and `dataset` of the run.
        choices: all other settings of spec and run.
        splits: case names of each fold, from `make_folds`.
        layout: layout of the dataset; the card names it, and the licence.
        problems: why other cases and files are not used; plan.json lists them.
    """
    paths = BundlePaths(run["bundle"])
    reasons = {choice.name.partition(".")[2]: choice.explanation for choice in choices}
    spec = nested_values(choices, "spec.")
    write_yaml(paths.spec, spec, reasons, SPEC_HEADING)
    write_json(paths.splits, splits)
    write_json(
        paths.plan,
        {
            "dataset": layout.kind,
            "cases": len(splits[0]["train"]) + len(splits[0]["val"]),
            "left_out": {problem.case: problem.message for problem in problems},
            "choices": [
                {"name": choice.name, "value": choice.value, "reason": choice.explanation}
                for choice in choices
            ],
        },
    )
    licence = f", {layout.licence}" if layout.licence else ""
    card = draft_card(paths.folder.name, list(spec["labels"]), f"{layout.kind}{licence}")
    write_yaml(paths.card, card, {}, CARD_HEADING)
    content = {
        "bundle": run["bundle"],
        "dataset": run["dataset"],
        "splits": str(paths.splits),
        "fold": 0,
        **nested_values(choices, "run."),
    }
    write_yaml(path, content, reasons, f"A training run: volseg train {path.name}")


def draft_card(name: str, labels: Sequence[str], data_source: str) -> dict[str, Any]:
    """Return the content of a card that its owner completes.

    Args:
        name: title of the bundle.
        labels: names of the labels, background first.
        data_source: data that the weights are trained on.
    """
    return {
        "name": name,
        "description": f"A U-Net that segments {', '.join(labels[1:])}.",
        "task": "Segmentation of MR images",
        "authors": PLACEHOLDER,
        "copyright": PLACEHOLDER,
        "intended_use": "Research; not a medical device, not for diagnosis.",
        "data_source": data_source,
        "data_type": "NIfTI",
        "references": [],
        "eval_metrics": {},
        "changelog": {"0.1.0": "first weights"},
    }


def write_yaml(
    path: Path, content: Mapping[str, Any], reasons: Mapping[str, str], heading: str
) -> None:
    """Write a mapping as YAML with comments; see `commented_yaml`."""
    write_atomically(path, commented_yaml(content, reasons, heading).encode())


def commented_yaml(content: Mapping[str, Any], reasons: Mapping[str, str], heading: str) -> str:
    """Return a mapping as YAML with comments.

    Args:
        content: mapping of plain values.
        reasons: key of the top level → comment above it.
        heading: comment in the first line.
    """
    lines = [f"# {heading}"]
    for key, value in content.items():
        text = yaml.safe_dump(
            value, sort_keys=False, default_flow_style=True, width=LINE_WIDTH, allow_unicode=True
        )
        # PyYAML writes a line "..." after a scalar, the end of its document
        first, *rest = text.removesuffix("...\n").splitlines()
        if key in reasons:
            lines.append(f"# {reasons[key]}")
        lines += [f"{key}: {first}", *("  " + line.strip() for line in rest)]
    return "\n".join(lines) + "\n"
