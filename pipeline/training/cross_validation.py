"""Cross-validation: train every fold, score its held-out cases, join the folds to an ensemble."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline.batch import output_path, read_case
from pipeline.bundle import open_bundle, refresh_bundle
from pipeline.config import BundlePaths, Card, Run, load_config, load_spec, read_yaml
from pipeline.errors import ConfigError
from pipeline.evaluation import (
    QualityCase,
    QualityScore,
    ScoreRow,
    SummaryRow,
    draw_dice,
    fit_quality,
    nested_quality,
    segment_and_score,
    summarise_scores,
)
from pipeline.inference import stored_features, write_quality
from pipeline.io import fold_cases, read_splits, sha256, write_atomically, write_csv, write_json
from pipeline.networks import member_states, read_state, save_state
from pipeline.report import bundle_page, quality_section
from pipeline.training.postprocessing import (
    HeldOutCase,
    Postprocessing,
    Rule,
    choose_postprocessing,
)
from pipeline.training.trainer import EpochDone, train_bundle
from pipeline.types import Case

QUALITY_METHOD = """\
The Dice that is predicted for each case, against its true Dice. The cases of each fold were
predicted from the out-of-fold predictions of the other folds; the fit that the bundle keeps is that
of all folds. A single network made the fitted predictions, and the bundle averages several."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutOfFold:
    """Cross-validation scores: each case is segmented by the model of the fold that held it out.

    Only trained folds are present.

    Attributes:
        scores: fold number → score rows of its held-out cases.
        summary: one row per label over the held-out cases of all folds, and one for their mean.
        by_fold: fold number → summary of its held-out cases.
    """

    scores: Mapping[int, Sequence[ScoreRow]]
    summary: Sequence[SummaryRow]
    by_fold: Mapping[int, Sequence[SummaryRow]]

    @property
    def folds(self) -> list[int]:
        """Numbers of the trained folds."""
        return list(self.scores)


def cross_validate(
    run: Run,
    content: dict[str, Any],
    *,
    only: Sequence[int] = (),
    epoch_done: Callable[[int], EpochDone] | None = None,
) -> Sequence[SummaryRow]:
    """Train every fold, score the held-out cases, and make the bundle an ensemble of the folds.

    Fold K becomes a bundle of its own in `folds/K` of the run's bundle. A fold that is already
    trained is not trained again; one that was interrupted is resumed. The label maps of its
    held-out cases are written to `crossval/fold_K`, and the scores of all trained folds to
    `crossval/scores.csv`, `summary.json` and `dice.png`. Card, README, spec and weights of the
    run's bundle are replaced.

    Args:
        run: settings of the training run; its `fold` is ignored.
        content: content of the YAML file that `run` was parsed from; each fold gets a copy.
        only: numbers of the folds to train, from 0; all folds if empty.
        epoch_done: called with the number of a fold before it is trained; the function that it
            returns is called with the row of the history after each epoch of the fold.

    Returns:
        The summary over the held-out cases of all trained folds: one row per label and, with
        several labels, one for their mean.

    Raises:
        ConfigError: the run has no splits, or a fold in `only` does not exist.
        PipelineError: a fold cannot be trained or scored; see `train_bundle`.
    """
    paths = BundlePaths(run.bundle)
    count = _number_of_folds(run, only)
    for fold in only or range(count):
        _train_fold(paths, run, content, fold, epoch_done(fold) if epoch_done else None)
    # With `only`, folds that an earlier call trained are scored and joined as well.
    trained = [fold for fold in range(count) if _is_trained(paths.fold(fold))]
    out_of_fold = _score_folds(paths, run, trained)
    postprocessing = choose_postprocessing(
        load_spec(_single_fold_spec(paths)), _held_out_predictions(paths, run, out_of_fold)
    )
    quality = _quality_cases(paths, out_of_fold)
    structures = list(load_spec(_single_fold_spec(paths)).values_of)
    nested = nested_quality(quality, structures)
    _write_scores(paths, out_of_fold, postprocessing, nested)
    _write_card_and_page(paths, out_of_fold, nested)
    _join_folds(paths, trained, postprocessing)
    _fit_quality(paths, quality, structures, nested)
    return out_of_fold.summary


def _number_of_folds(run: Run, only: Sequence[int]) -> int:
    """Return how many folds the run's splits have.

    Raises:
        ConfigError: the run has no splits, or a fold in `only` does not exist.
    """
    if run.splits is None:
        raise ConfigError("run.splits: expected a file of folds; `volseg plan` writes one")
    count = len(read_splits(run.dataset, run.splits))
    for fold in only:
        if not 0 <= fold < count:
            raise ConfigError(f"fold {fold}: {run.splits} holds folds 0 to {count - 1}")
    return count


def _is_trained(fold: BundlePaths) -> bool:
    # a run that completes deletes its checkpoint
    return fold.weights.is_file() and not fold.checkpoint.exists()


def _single_fold_spec(paths: BundlePaths) -> Path:
    """Return the path of the spec that a single fold is trained for.

    It is the bundle's spec.yaml, until `_join_folds` has replaced that by the ensemble's and kept
    the former as single_fold.yaml.
    """
    return paths.single_fold_spec if paths.single_fold_spec.is_file() else paths.spec


def _predictions(paths: BundlePaths, fold: int) -> Path:
    """Return the folder of the label maps of a fold's held-out cases."""
    return paths.cross_validation / f"fold_{fold}"


def _held_out_cases(run: Run, fold: int) -> list[Case]:
    return fold_cases(run.dataset, run.splits, fold, "val")


def _train_fold(
    paths: BundlePaths,
    run: Run,
    content: dict[str, Any],
    fold: int,
    epoch_done: EpochDone | None,
) -> None:
    """Train one fold in a bundle of its own, or resume it; do nothing if it is already trained."""
    own = paths.fold(fold)
    if _is_trained(own):
        return
    own.configs.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_single_fold_spec(paths), own.spec)
    shutil.copyfile(paths.card, own.card)
    changes = {"bundle": str(own.folder), "fold": fold}
    train_bundle(
        replace(run, bundle=str(own.folder), fold=fold),
        content | changes,
        epoch_done,
        resume=own.checkpoint.is_file(),
    )


def _score_folds(paths: BundlePaths, run: Run, folds: Sequence[int]) -> OutOfFold:
    """Segment and score the held-out cases of each trained fold."""
    scores: dict[int, Sequence[ScoreRow]] = {}
    by_fold: dict[int, Sequence[SummaryRow]] = {}
    all_rows: list[ScoreRow] = []
    for fold in folds:
        model = replace(open_bundle(paths.fold(fold).folder), keep_quality_features=True)
        cases = _held_out_cases(run, fold)
        evaluation = segment_and_score(model, cases, _predictions(paths, fold))
        scores[fold] = evaluation.scores
        by_fold[fold] = evaluation.summary
        all_rows += evaluation.scores
    return OutOfFold(scores=scores, summary=summarise_scores(all_rows), by_fold=by_fold)


def _quality_cases(paths: BundlePaths, out_of_fold: OutOfFold) -> list[QualityCase]:
    """Return the held-out cases with the features of their predictions, a group per fold.

    Cases that an earlier version segmented have no features, and are left out.
    """
    found = []
    for fold, rows in out_of_fold.scores.items():
        dice: dict[str, dict[str, float]] = {}
        for row in rows:
            dice.setdefault(row.case, {})[row.label] = row.score.dice
        for case, of_label in dice.items():
            record = read_case(_predictions(paths, fold), case)
            if record is not None and record.status == "done" and record.quality_features:
                features = stored_features(record.quality_features)
                found.append(
                    QualityCase(case=case, group=str(fold), features=features, dice=of_label)
                )
    return found


def _fit_quality(
    paths: BundlePaths,
    cases: Sequence[QualityCase],
    structures: Sequence[str],
    nested: Sequence[QualityScore],
) -> None:
    """Fit the predicted Dice of the bundle, for its present weights, or remove an old fit."""
    folds = len({case.group for case in cases})
    model = fit_quality(
        cases,
        structures,
        weights_sha256=sha256(paths.weights),
        fitted_on=f"{len(cases)} out-of-fold predictions of {folds} folds",
        scores=nested,
    )
    if model is None:
        paths.quality.unlink(missing_ok=True)
    else:
        write_quality(paths.quality, model)


def _write_scores(
    paths: BundlePaths,
    out_of_fold: OutOfFold,
    postprocessing: Postprocessing,
    nested: Sequence[QualityScore],
) -> None:
    """Write scores.csv, summary.json and dice.png of all folds together."""
    folder = paths.cross_validation
    all_rows: list[ScoreRow] = []
    table = []
    for fold, rows in out_of_fold.scores.items():
        all_rows += rows
        table += [{"fold": fold, **row.columns()} for row in rows]
    write_csv(folder / "scores.csv", table)
    by_fold = {}
    for fold, summary in out_of_fold.by_fold.items():
        by_fold[fold] = [row.columns() for row in summary]
    write_json(
        folder / "summary.json",
        {
            "folds": out_of_fold.folds,
            "labels": [row.columns() for row in out_of_fold.summary],
            "by_fold": by_fold,
            "postprocessing": postprocessing.columns(),
            "predicted_quality": [score.columns() for score in nested],
        },
    )
    draw_dice(all_rows, folder / "dice.png", title=f"{paths.folder.name}, out of fold")


def _held_out_predictions(
    paths: BundlePaths, run: Run, out_of_fold: OutOfFold
) -> list[HeldOutCase]:
    """Return the held-out cases of the trained folds that were segmented and scored."""
    found = []
    for fold, rows in out_of_fold.scores.items():
        scored = {row.case for row in rows}
        for case in _held_out_cases(run, fold):
            prediction = output_path(_predictions(paths, fold), case["case"])
            if case["case"] in scored and prediction.is_file():
                found.append(HeldOutCase(case=case, prediction=prediction, fold=fold))
    return found


def _write_card_and_page(
    paths: BundlePaths, out_of_fold: OutOfFold, nested: Sequence[QualityScore]
) -> None:
    """Write the mean Dice into the bundle's card, and the bundle's page."""
    content = read_yaml(paths.card, "card")
    metrics = {}
    for row in out_of_fold.summary:
        metrics[f"dice_{row.label}"] = round(row.metrics["dice"].mean, 4)
    content["eval_metrics"] = metrics
    _write_yaml(paths.card, content)
    card = load_config(Card, paths.card, "card")
    quality = quality_section(nested, QUALITY_METHOD, "volseg crossval configs/run.yaml")
    page = bundle_page(card, out_of_fold.summary, out_of_fold.by_fold, quality)
    write_atomically(paths.readme, page.encode())


def _join_folds(paths: BundlePaths, folds: Sequence[int], postprocessing: Postprocessing) -> None:
    """Make the bundle an ensemble of the networks of its folds, with the rules of its labels."""
    content = read_yaml(_single_fold_spec(paths), "spec")
    if not paths.single_fold_spec.is_file():
        # spec.yaml becomes the ensemble's below; folds trained later need that of a single network
        shutil.copyfile(paths.spec, paths.single_fold_spec)
    networks = []
    for fold in folds:
        state = read_state(paths.fold(fold).weights)
        networks += member_states(state)  # several where a fold is itself an ensemble
    content["network"]["ensemble"] = len(networks)
    content |= _rules_of_spec(postprocessing.rules)
    _write_yaml(paths.spec, content)
    shutil.copyfile(paths.fold(folds[0]).run, paths.run)
    save_state(_ensemble_state(networks), paths.weights)
    refresh_bundle(paths.folder)


def _rules_of_spec(rules: Mapping[str, Rule]) -> dict[str, Any]:
    """Return the keys of spec.yaml for the rules of some labels; no key without a rule."""
    keys = {
        "largest_component": [label for label, rule in rules.items() if rule.largest],
        "min_component_ml": {label: rule.min_ml for label, rule in rules.items() if rule.min_ml},
        "fill_holes": [label for label, rule in rules.items() if rule.fill],
    }
    return {key: value for key, value in keys.items() if value}


def _ensemble_state(networks: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the state dict of an `Ensemble` with these members; of the network if there is one."""
    if len(networks) == 1:
        return networks[0]
    joined = {}
    for i, state in enumerate(networks):
        for name, tensor in state.items():
            joined[f"members.{i}.{name}"] = tensor
    return joined


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_atomically(path, text.encode())
