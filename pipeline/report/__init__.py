"""Pages that people read, as pure functions from results to text; their callers write the files.

The HTML report of a batch belongs here too.

- `bundle_page`: the Markdown page of a cross-validated bundle.
"""

from pipeline.report.bundle_page import bundle_page

__all__ = ["bundle_page"]
