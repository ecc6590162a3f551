"""Writing the pages of a bundle."""

from __future__ import annotations

from pipeline.config import BundlePaths, Card, load_config, load_spec
from pipeline.io import write_atomically
from pipeline.report.bundle_page import GENERATED, trained_page
from pipeline.report.training_page import read_training_record, training_page
from pipeline.types import PathOrStr


def write_training_report(root: PathOrStr) -> None:
    """Write the pages of a bundle that a run has just trained: train/report.md and docs/README.md.

    A README that somebody else wrote, or changed without the last line, is left as it is.

    Args:
        root: the bundle's folder, with card, spec, run and the files of its training.

    Raises:
        ConfigError: one of these files is missing or wrong.
        WriteError: a page cannot be written.
    """
    paths = BundlePaths(root)
    record = read_training_record(paths)
    write_atomically(paths.training_report, training_page(record).encode())
    card = load_config(Card, paths.card, "card")
    if paths.readme.is_file() and GENERATED not in paths.readme.read_text(encoding="utf-8"):
        return
    page = trained_page(card, load_spec(paths.spec), record.scores, record.name)
    write_atomically(paths.readme, page.encode())
