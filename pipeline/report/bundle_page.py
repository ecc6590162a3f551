"""The README of a trained or cross-validated bundle, in Markdown (docs/README.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.config import Card, Spec
from pipeline.evaluation import QualityScore, ScoreRow, SummaryRow, summarise_scores
from pipeline.report.markdown import markdown_table

QUALITY_HEADING = "## Predicted quality"
# the last line of a README that the next training may replace
GENERATED = "<!-- Written by `volseg train`; remove this line to keep your changes. -->"


def bundle_page(
    card: Card,
    summary: Sequence[SummaryRow],
    by_fold: Mapping[int, Sequence[SummaryRow]],
    quality: str = "",
) -> str:
    """Return the README of a cross-validated bundle as Markdown.

    It has the bundle's description, a table of the Dice in each fold, and the command that repeats
    the training.

    Args:
        card: description of the bundle.
        summary: summary over the cases of all folds: one row per label, and one for their mean.
        by_fold: fold number → summary of its held-out cases, with the same labels.
        quality: section on the predicted Dice, from `quality_section`; empty leaves it out.
    """
    return f"""\
{_introduction(card)}

## Scores

Dice of each case, segmented by the fold that was not trained on it: means with bootstrap 95 %
intervals.

{_dice_table(summary, by_fold)}

The settings of the training run are in `configs/run.yaml`. To repeat it:

```bash
volseg crossval configs/run.yaml
```
{quality and chr(10) + quality}
Data: {card.data_source}.
"""


def trained_page(card: Card, spec: Spec, scores: Sequence[ScoreRow], bundle: str) -> str:
    """Return the README of a bundle that a single run has trained, as Markdown.

    Args:
        card: description of the bundle.
        spec: its inputs and outputs.
        scores: Dice of the held-out cases; empty if the run scored none.
        bundle: name of its folder.
    """
    return f"""\
{_introduction(card)}

```bash
volseg segment scans/ -o out --bundle {bundle}
```

## Input and output

Channels: {", ".join(spec.channels)}. The network sees voxels of {_spacing(spec)}, and label maps
have the grid of the scan.

{_label_table(spec)}

## Scores

{_single_run_scores(scores)}

The report of the training is [train/report.md](../train/report.md), its settings are in
`configs/run.yaml`. To repeat it:

```bash
volseg train configs/run.yaml
```

Data: {card.data_source}.

{GENERATED}
"""


def draft_page(card: Card, spec: Spec, bundle: str) -> str:
    """Return the README of a bundle that has no weights yet, as Markdown.

    Args:
        card: description of the bundle.
        spec: its inputs and outputs.
        bundle: name of its folder.
    """
    return f"""\
{_introduction(card)}

This bundle has no weights yet. Training writes them, and this page again with its scores:

```bash
volseg train {bundle}/configs/run.yaml dataset=FOLDER
```

## Input and output

Channels: {", ".join(spec.channels)}. The network sees voxels of {_spacing(spec)}, and label maps
have the grid of the scan.

{_label_table(spec)}

Data: {card.data_source}.

{GENERATED}
"""


def quality_section(scores: Sequence[QualityScore], method: str, command: str) -> str:
    """Return the section of a README on the predicted Dice, as Markdown.

    Args:
        scores: figures on cases that were not fitted, the mean over all structures first; empty if
            there are none.
        method: sentences on the cases that were fitted and scored.
        command: command that makes the figures.
    """
    table = "No figures: there were too few cases to leave some out of the fit."
    if scores:
        header = [
            *("label", "cases", "MAE", "MAE of the mean", "coverage of the 90 % interval"),
            *("its width", "cases below .7", "AUROC for Dice < .7", "correlation"),
        ]
        table = markdown_table(header, [_quality_line(score) for score in scores])
    return f"""\
{QUALITY_HEADING}

{method}

{table}

MAE is the mean absolute error of the predicted Dice; the MAE of the mean is that of a prediction
that is always the mean of these cases. AUROC is nan where no case, or every case, is below .7. The
command is

```bash
{command}
```
"""


def with_section(page: str, section: str) -> str:
    """Return a page with a section in place of the one with the same heading, or at its end.

    Args:
        page: a page in Markdown.
        section: it begins with a heading of level 2.
    """
    heading = section.splitlines()[0]
    lines = page.splitlines()
    if heading not in lines:
        return f"{page.rstrip()}\n\n{section}"
    begin = lines.index(heading)
    later = [i for i in range(begin + 1, len(lines)) if lines[i].startswith("## ")]
    end = later[0] if later else len(lines)
    before, after = "\n".join(lines[:begin]), "\n".join(lines[end:])
    return f"{before}\n{section.rstrip()}\n" + (f"\n{after}\n" if after else "")


def _quality_line(score: QualityScore) -> list[object]:
    figures = (score.mae, score.mae_constant, score.coverage, score.width)
    shown = [f"{figure:.3f}" for figure in figures]
    return [
        *(score.label, score.cases, *shown),
        *(score.low, f"{score.auroc:.3f}", f"{score.correlation:.3f}"),
    ]


def _introduction(card: Card) -> str:
    return f"# {card.name}\n\n{card.description}\n\n**Intended use.** {card.intended_use}"


def _spacing(spec: Spec) -> str:
    sizes = ["the scan's own" if mm is None else f"{mm:g}" for mm in spec.spacing]
    return f"{' × '.join(sizes)} mm along {', '.join(spec.orientation)}"


def _label_table(spec: Spec) -> str:
    lines = []
    for name, value in spec.labels.items():
        made_of = ", ".join(map(str, spec.regions[name])) if name in spec.regions else ""
        lines.append([value, name, made_of] if spec.regions else [value, name])
    header = ["value", "label"]
    if spec.regions:
        header.append("values in training label maps")
    return markdown_table(header, lines)


def _single_run_scores(scores: Sequence[ScoreRow]) -> str:
    if not scores:
        return "Not scored yet: `volseg evaluate` scores it on labelled cases."
    lines = []
    for row in summarise_scores(scores):
        dice = row.metrics["dice"]
        interval = f"{dice.mean:.4f} [{dice.low:.4f}, {dice.high:.4f}]"
        lines.append([row.label, row.cases, interval, f"{dice.median:.4f}"])
    table = markdown_table(["label", "cases", "mean Dice", "median"], lines)
    return f"Dice of the held-out cases of one fold, with bootstrap 95 % intervals.\n\n{table}"


def _dice_table(summary: Sequence[SummaryRow], by_fold: Mapping[int, Sequence[SummaryRow]]) -> str:
    lines = [_dice_line(str(fold), rows) for fold, rows in by_fold.items()]
    lines.append(_dice_line("all", summary))
    return markdown_table(["fold", "cases", *(row.label for row in summary)], lines)


def _dice_line(name: str, rows: Sequence[SummaryRow]) -> list[str]:
    cells = []
    for row in rows:
        dice = row.metrics["dice"]
        cells.append(f"{dice.mean:.4f} [{dice.low:.4f}, {dice.high:.4f}]")
    # the last row is the mean over labels: it counts all cases in which any label is scored
    return [name, str(rows[-1].cases), *cells]
