"""Pictures of the report for the documentation."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from browser import Page, open_page

from pipeline.report import ReportOptions, write_batch_report

IMAGES = Path(__file__).parent.parent / "docs" / "images"
WIDTH, HEIGHT, QUALITY = 1280, 800, 70


def main(folder: Path) -> None:
    """Write the report of an output folder, and pictures of its parts."""
    index = write_batch_report(folder.resolve(), options=ReportOptions(viewer="all"))
    with open_page() as page:
        page.resize(WIDTH, HEIGHT)
        page.open(index.as_uri())
        page.wait("document.documentElement.dataset.ready")
        while not page.run("Boolean(document.querySelector('.mosaic'))"):
            page.press("j")
        page.press("p")
        save(page, "report_cases")
        page.press("v")
        page.wait("document.querySelector('#viewer-box').dataset.ready")
        save(page, "report_viewer")
        page.click("#tab-volumes")
        save(page, "report_volumes")


def save(page: Page, name: str) -> None:
    """Write a picture of the window, once it has been drawn."""
    time.sleep(1)
    picture = page.screenshot(image_format="webp", quality=QUALITY)
    (IMAGES / f"{name}.webp").write_bytes(picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
