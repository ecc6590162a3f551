"""Pages for readers: of a bundle and of a training run in Markdown, of a batch in HTML.

- `bundle_page`: the README of a trained or cross-validated bundle.
- `training_page`: the report of a training run.
- `writing`: the pages of a bundle as files.
- `markdown`: tables.
- `batch_page`: the report of a batch, a folder of pages that work offline.
- `case_rows`: the cases and structures of a report, as plain data.
- `outliers`: volumes that stand out in a batch.
- `shown_volume`: what is shown of a scan: on one grid, in eight bits, without the face.
- `mosaic`: slices in three planes with outlines of the labels.
- `viewer_volume`: volumes for the viewer.
- `payload`: data of a page as a script file.
- `view_server`: the viewer of one scan on the loopback interface.
"""

from pipeline.report.batch_page import Choice, ReportOptions, read_marks, write_batch_report
from pipeline.report.bundle_page import (
    bundle_page,
    draft_page,
    quality_section,
    trained_page,
    with_section,
)
from pipeline.report.training_page import TrainingRecord, read_training_record, training_page
from pipeline.report.view_server import ViewServer, view_files
from pipeline.report.writing import write_training_report

__all__ = [
    "Choice",
    "ReportOptions",
    "TrainingRecord",
    "ViewServer",
    "bundle_page",
    "draft_page",
    "quality_section",
    "read_marks",
    "read_training_record",
    "trained_page",
    "training_page",
    "view_files",
    "with_section",
    "write_batch_report",
    "write_training_report",
]
