"""Every fold of a run: trained, scored on the cases that it never saw, and joined to one bundle."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import yaml

from pipeline.batch import output_path, segment_cases
from pipeline.bundle import open_bundle, refresh_bundle
from pipeline.config import Run, Spec, load_spec, read_yaml
from pipeline.errors import ConfigError
from pipeline.evaluation import dice, draw_dice, score_case, summarise_scores
from pipeline.inference import largest_components
from pipeline.io import fold_cases, read, read_splits, write_atomically, write_csv, write_json
from pipeline.networks import member_states, save_state
from pipeline.training.trainer import CHECKPOINT, EpochDone, train_bundle
from pipeline.types import Case

SCORES = "crossval"  # in the bundle: out-of-fold predictions and what they score
Row = dict[str, Any]


def cross_validate(
    run: Run,
    content: dict[str, Any],
    *,
    only: Sequence[int] = (),
    epoch_done: Callable[[int], EpochDone] | None = None,
) -> list[Row]:
    """Trains each fold into `folds/K` of the run's bundle, and makes of those that there are one ensemble in the bundle itself.

    A fold that is trained already is not trained again, one that was cut off goes on. Predictions of the cases that a fold left
    out stay in `crossval/fold_K`; `crossval/scores.csv`, `summary.json` and `dice.png` score all of them together.

    Args:
        run: of which `fold` does not count.
        content: the YAML that gives it.
        only: the folds to train; all without.
        epoch_done: a fold's number → what is called after each of its epochs.

    Returns:
        the summary, one row a label and one for their mean.

    Raises:
        ConfigError: a run without splits, or no such fold.
    """
    if run.splits is None:
        raise ConfigError("run.splits: expected a file of folds; `volseg plan` writes one")
    count = len(read_splits(run.dataset, run.splits))
    unknown = [fold for fold in only if not 0 <= fold < count]
    if unknown:
        raise ConfigError(f"fold {unknown[0]}: {run.splits} holds folds 0 to {count - 1}")
    root = Path(run.bundle)
    for fold in only or range(count):
        _train(root, run, content, fold, epoch_done(fold) if epoch_done else None)
    done = [
        fold
        for fold in range(count)
        if _weights(root, fold).is_file() and not (root / "folds" / str(fold) / CHECKPOINT).exists()
    ]
    rows = [{"fold": fold, **row} for fold in done for row in _out_of_fold(root, run, fold)]
    spec = load_spec(_one_spec(root))
    summary = summarise_scores(rows)
    write_csv(root / SCORES / "scores.csv", rows)
    largest = _largest_component(root, run, done, spec)
    by_fold = {
        fold: summarise_scores([row for row in rows if row["fold"] == fold]) for fold in done
    }
    write_json(
        root / SCORES / "summary.json",
        {"folds": done, "labels": summary, "by_fold": by_fold, "largest_component": largest},
    )
    draw_dice(rows, root / SCORES / "dice.png", title=f"{root.name}, out of fold")
    _tell(root, summary, by_fold)
    _join(root, done, keep_largest=bool(largest["kept"]))
    return summary


def _weights(root: Path, fold: int) -> Path:
    return root / "folds" / str(fold) / "models" / "model.pt"


def _one_spec(root: Path) -> Path:
    """The spec of a single fold: the bundle's own, kept under another name once the bundle is an ensemble."""
    kept = root / "configs" / "single_fold.yaml"
    return kept if kept.is_file() else root / "configs" / "spec.yaml"


def _train(
    root: Path, run: Run, content: dict[str, Any], fold: int, epoch_done: EpochDone | None
) -> None:
    """One fold, unless it is trained already."""
    own = root / "folds" / str(fold)
    unfinished = (own / CHECKPOINT).is_file()
    if _weights(root, fold).is_file() and not unfinished:
        return
    (own / "configs").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_one_spec(root), own / "configs" / "spec.yaml")
    shutil.copyfile(root / "configs" / "card.yaml", own / "configs" / "card.yaml")
    settings = {"bundle": str(own), "fold": fold}
    train_bundle(
        replace(run, bundle=str(own), fold=fold), content | settings, epoch_done, resume=unfinished
    )


def _out_of_fold(root: Path, run: Run, fold: int) -> Iterator[Row]:
    """The scores of the cases that a fold left out, segmented by it."""
    out = root / SCORES / f"fold_{fold}"
    model = open_bundle(root / "folds" / str(fold))
    cases = fold_cases(run.dataset, run.splits, fold, "val")
    segment_cases(model, cases, out)
    for case in cases:
        yield from score_case(case, output_path(out, case["case"]), model.spec.labels)


def _largest_component(root: Path, run: Run, folds: Sequence[int], spec: Spec) -> Row:
    """What Dice out of fold gains by keeping the largest part of each label only; done where no label loses and one gains."""
    plain: dict[str, list[float]] = {name: [] for name, value in spec.labels.items() if value}
    kept: dict[str, list[float]] = {name: [] for name in plain}
    for fold in folds:
        for case in fold_cases(run.dataset, run.splits, fold, "val"):
            path = output_path(root / SCORES / f"fold_{fold}", case["case"])
            if path.is_file():
                for name, (before, after) in _both(case, path, spec).items():
                    plain[name].append(before)
                    kept[name].append(after)
    gains = {name: fmean(kept[name]) - fmean(plain[name]) if plain[name] else nan for name in plain}
    better = all(gain >= 0 for gain in gains.values()) and any(gain > 0 for gain in gains.values())
    return {"gain": gains, "kept": better and not spec.largest_component}


def _both(case: Case, path: Path, spec: Spec) -> dict[str, tuple[float, float]]:
    """Each label's Dice in one case, as it is and with its largest part only; labels that neither map has are left out."""
    found, there = np.asarray(read(path).array), np.rint(read(case["label"]).array)
    values = {name: value for name, value in spec.labels.items() if value}
    numbers = sum((found == value) * (i + 1) for i, value in enumerate(values.values()))
    largest = largest_components(torch.from_numpy(np.asarray(numbers, dtype=np.int32))).numpy()
    pairs = {
        name: (dice(found == value, there == value), dice(largest == i + 1, there == value))
        for i, (name, value) in enumerate(values.items())
    }
    return {name: pair for name, pair in pairs.items() if pair[0] == pair[0]}


def _tell(root: Path, summary: Sequence[Row], by_fold: dict[int, list[Row]]) -> None:
    """The scores in the card, and a page with a row a fold."""
    card = read_yaml(root / "configs" / "card.yaml", "card")
    card["eval_metrics"] = {f"dice_{row['label']}": round(row["dice"], 4) for row in summary}
    write_atomically(
        root / "configs" / "card.yaml",
        yaml.safe_dump(card, sort_keys=False, allow_unicode=True).encode(),
    )
    names = [str(row["label"]) for row in summary]
    lines = [
        f"# {card['name']}",
        "",
        card["description"],
        "",
        f"**Intended use.** {card['intended_use']}",
        "",
        "## Scores",
        "",
    ]
    lines += [
        "Dice of each case segmented by the fold that did not see it; means with bootstrap 95 % intervals.",
        "",
    ]
    lines += [f"| fold | cases | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for fold, rows in [*by_fold.items(), ("all", summary)]:
        cells = [
            f"{row['dice']:.4f} [{row['dice_low']:.4f}, {row['dice_high']:.4f}]" for row in rows
        ]
        lines.append(f"| {fold} | {rows[-1]['cases']} | {' | '.join(cells)} |")
    lines += [
        "",
        "How the training went stands in `configs/run.yaml`; it is repeated by",
        "",
        "```bash",
    ]
    lines += ["volseg crossval configs/run.yaml", "```", "", f"Data: {card['data_source']}.", ""]
    write_atomically(root / "docs" / "README.md", "\n".join(lines).encode())


def _join(root: Path, folds: Sequence[int], *, keep_largest: bool) -> None:
    """The bundle itself: the folds' networks as one ensemble, whose spec says how many there are."""
    content = read_yaml(_one_spec(root), "spec")
    if _one_spec(root).name == "spec.yaml":
        shutil.copyfile(root / "configs" / "spec.yaml", root / "configs" / "single_fold.yaml")
    states = [
        torch.load(_weights(root, fold), map_location="cpu", weights_only=True) for fold in folds
    ]
    networks = [network for state in states for network in member_states(state)]
    joined = {
        f"members.{i}.{name}": tensor
        for i, state in enumerate(networks)
        for name, tensor in state.items()
    }
    content["network"]["ensemble"] = len(networks)
    if keep_largest:
        content["largest_component"] = ["each"]
    write_atomically(
        root / "configs" / "spec.yaml",
        yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode(),
    )
    shutil.copyfile(
        root / "folds" / str(folds[0]) / "configs" / "run.yaml", root / "configs" / "run.yaml"
    )
    save_state(joined if len(networks) > 1 else states[0], root / "models" / "model.pt")
    refresh_bundle(root)
