"""Pages for readers, in Markdown.

- `bundle_page`: the README of a trained or cross-validated bundle.
- `training_page`: the report of a training run.
- `writing`: the pages of a bundle as files.
- `markdown`: tables.
"""

from pipeline.report.bundle_page import bundle_page, trained_page
from pipeline.report.training_page import TrainingRecord, read_training_record, training_page
from pipeline.report.writing import write_training_report

__all__ = [
    "TrainingRecord",
    "bundle_page",
    "read_training_record",
    "trained_page",
    "training_page",
    "write_training_report",
]
