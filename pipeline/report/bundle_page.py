"""The README of a cross-validated bundle, in Markdown (docs/README.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.config import Card
from pipeline.evaluation import SummaryRow


def bundle_page(
    card: Card, summary: Sequence[SummaryRow], by_fold: Mapping[int, Sequence[SummaryRow]]
) -> str:
    """Return the README of a cross-validated bundle as Markdown.

    It has the bundle's description, a table of the Dice in each fold, and the command that repeats
    the training.

    Args:
        card: description of the bundle.
        summary: summary over the cases of all folds: one row per label, and one for their mean.
        by_fold: fold number → summary of its held-out cases, with the same labels.
    """
    return f"""\
# {card.name}

{card.description}

**Intended use.** {card.intended_use}

## Scores

Dice of each case, segmented by the fold that was not trained on it: means with bootstrap 95 %
intervals.

{_dice_table(summary, by_fold)}

The settings of the training run are in `configs/run.yaml`. To repeat it:

```bash
volseg crossval configs/run.yaml
```

Data: {card.data_source}.
"""


def _dice_table(summary: Sequence[SummaryRow], by_fold: Mapping[int, Sequence[SummaryRow]]) -> str:
    labels = [row.label for row in summary]
    lines = [f"| fold | cases | {' | '.join(labels)} |", "|---" * (len(labels) + 2) + "|"]
    for fold, rows in by_fold.items():
        lines.append(_dice_line(str(fold), rows))
    lines.append(_dice_line("all", summary))
    return "\n".join(lines)


def _dice_line(name: str, rows: Sequence[SummaryRow]) -> str:
    cells = []
    for row in rows:
        dice = row.metrics["dice"]
        cells.append(f"{dice.mean:.4f} [{dice.low:.4f}, {dice.high:.4f}]")
    # the last row is the mean over labels: it counts all cases in which any label is scored
    return f"| {name} | {rows[-1].cases} | {' | '.join(cells)} |"
