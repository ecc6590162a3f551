"""The page of a cross-validated bundle."""

from __future__ import annotations

from math import nan

import pytest
from phantom import CARD

from pipeline.config import Card, parse_config
from pipeline.evaluation import Mean, SummaryRow
from pipeline.report import bundle_page


def summary(cases: int, dice: float) -> list[SummaryRow]:
    rows = []
    for label in ("front", "back", "mean"):
        mean = Mean(mean=dice, low=dice - 0.1, high=dice + 0.1, median=dice, infinite=0)
        rows.append(
            SummaryRow(label=label, cases=cases, missed=0, invented=0, metrics={"dice": mean})
        )
    return rows


@pytest.fixture
def page() -> str:
    card = parse_config(Card, CARD, "card")
    return bundle_page(card, summary(5, 0.7), {0: summary(3, 0.8), 2: summary(2, nan)})


def test_the_page_introduces_the_bundle(page: str) -> None:
    """Name, description, intended use, data, and the command that repeats the training."""
    assert page.startswith("# Tiny\n\nMade-up weights for tests.\n\n**Intended use.** tests\n")
    assert page.endswith("\n\nData: noise.\n")
    assert "\nvolseg crossval configs/run.yaml\n" in page


def test_the_table_has_one_line_per_fold_and_one_for_all(page: str) -> None:
    table = [line for line in page.splitlines() if line.startswith("|")]
    value = "0.8000 [0.7000, 0.9000]"
    assert table[0] == "| fold | cases | front | back | mean |"
    assert table[1] == "|---|---|---|---|---|"
    assert table[2] == f"| 0 | 3 | {value} | {value} | {value} |"
    assert table[3].startswith("| 2 | 2 | nan [nan, nan] |")
    assert table[4].startswith("| all | 5 | 0.7000 [0.6000, 0.8000] |")
    assert len(table) == 5
