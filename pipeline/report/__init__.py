"""Pages for readers: functions that return text, which their callers write to files.

- `bundle_page`: the README of a cross-validated bundle, in Markdown.
"""

from pipeline.report.bundle_page import bundle_page

__all__ = ["bundle_page"]
