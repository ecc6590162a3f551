"""Pictures of the report, of BIDS tables and of DICOM segmentations for the documentation.

    scripts/screenshots runs/screenshots

They show heads that `scripts/synthesize.py` draws from label maps, so that no scan of a person is
in the documentation. The folder gets the heads, a BIDS dataset and a DICOM exam of them and their
results; what is there already is not computed again.
"""

from __future__ import annotations

import csv
import html
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import nibabel as nib
import numpy as np
import yaml
from browser import Page, open_page
from scipy.ndimage import distance_transform_edt
from synthesize import main as synthesize

from pipeline.io import read, write_csv
from pipeline.report import ReportOptions, write_batch_report
from pipeline.types import Array

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
sys.path.append(str(ROOT / "tests"))
WIDTH, HEIGHT, QUALITY = 1280, 800, 70
CONFIG = ROOT / "configs" / "brain_mr_structures.yaml"
# of the drawn images: T1-weighted, sharp, whole heads that lie straight
LOOK = {
    "shift": 0.0, "rotation": 6.0, "scaling": 0.06, "t1_chance": 1.0, "sequence_chance": 0.0,
    "resolution_chance": 0.0, "slices_chance": 0.0, "cut_chance": 0.0, "strip_chance": 0.0,
    "noise": 0.015, "bias": 0.15, "gamma": 0.05, "texture": 0.1,
}  # fmt: skip
FIELD_MM = ("180", "210", "230")
SPACING_MM = 1.5
# Participant, session and age of each image. Enough for outliers to be looked for; the anatomies of
# two held-out label maps alternate, so that both sessions of sub-01 have the same one.
SCANS = (
    ("sub-01", "ses-pre", 34.2), ("sub-02", "ses-pre", 58.1), ("sub-01", "ses-post", 36.5),
    ("sub-03", "ses-pre", 41.7), ("sub-04", "ses-pre", 29.3), ("sub-05", "ses-pre", 63.0),
    ("sub-06", "ses-pre", 47.8), ("sub-07", "ses-pre", 52.4), ("sub-08", "ses-pre", 38.9),
    ("sub-09", "ses-pre", 66.6),
)  # fmt: skip
SEXES = {name: "FM"[number % 2] for number, name in enumerate(sorted({scan[0] for scan in SCANS}))}
CROPPED, CROPPED_SLICES = 3, 45  # one head without its top, which gets a warning
EVERY, STORED_MAX = 2, 2000  # of the DICOM series: each second plane of voxels
SLICE_MM = EVERY * SPACING_MM
TABLE_COLUMNS = (
    "participant_id", "session_id", "status", "sex", "age", "warnings",
    "left_hippocampus", "right_hippocampus", "intracranial",
)  # fmt: skip
TABLE_STYLE = """body { font: 14px system-ui, sans-serif; margin: 16px; color: #1a1a1a }
table { border-collapse: collapse } th, td { border: 1px solid #ccd; padding: 6px 10px }
th { background: #eef1f6; text-align: left } td.number { text-align: right }
td { max-width: 300px } h1 { font-size: 16px; font-weight: 600; margin: 0 0 12px }"""
SHOWN_FRAMES = 4
WHITE_PERCENTILE = 99.0  # of the voxels; noise has some much brighter ones
SHOWN_MM = 10.0  # of the scan around the labels, as in reports: no face is shown


@click.command()
@click.argument("work", type=click.Path(path_type=Path, file_okay=False))
def main(work: Path) -> None:
    """Draw heads into the folder WORK, segment them, and write the pictures into docs/images."""
    work = work.resolve()
    heads = drawn_heads(work / "drawn")
    bids, exam = bids_results(heads, work), dicom_results(heads[0], work)
    with open_page() as page:
        page.resize(WIDTH, HEIGHT)
        report_pictures(page, bids)
        exam_picture(page, exam, work)
        page.open(table_page(bids / "group_volumes.tsv", work / "group.html").as_uri())
        save(page, "bids_group", "table")
        page.open(overlay_page(work / "exam", exam, work / "overlay.html").as_uri())
        save(page, "dicom_seg", "main")


def drawn_heads(folder: Path) -> list[Path]:
    """Return drawn images of heads, one for each of `SCANS`; draw them if there are none."""
    content = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    content["synthesis"] = {"table": content["synthesis"]["table"], **LOOK}
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "t1.yaml"
    config.write_text(yaml.safe_dump(content), encoding="utf-8")
    if not (folder / "dataset.json").exists():
        words = [str(config), "-o", str(folder), "--count", str(len(SCANS)), "--seed", "0"]
        words += ["--spacing", str(SPACING_MM), "--field", *FIELD_MM]
        synthesize.main(words, standalone_mode=False)
    pairs = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["training"]
    return [folder / pair["image"] for pair in pairs]


def bids_results(heads: Sequence[Path], work: Path) -> Path:
    """Return the derivatives of a BIDS dataset of heads."""
    dataset, out = work / "bids", work / "bids_out"
    dataset.mkdir(exist_ok=True)
    description = {"Name": "Drawn heads", "BIDSVersion": "1.10.0"}
    (dataset / "dataset_description.json").write_text(json.dumps(description))
    for number, (participant, session, _) in enumerate(SCANS):
        name = f"{participant}_{session}_T1w.nii.gz"
        path = dataset / participant / session / "anat" / name
        save_head(heads[number], path, crop=number == CROPPED)
    for participant in SEXES:
        ages = {session: age for name, session, age in SCANS if name == participant}
        rows = [{"session_id": session, "age": age} for session, age in ages.items()]
        table = dataset / participant / f"{participant}_sessions.tsv"
        write_csv(table, rows, delimiter="\t")
    people = [{"participant_id": name, "sex": sex} for name, sex in SEXES.items()]
    write_csv(dataset / "participants.tsv", people, delimiter="\t")
    volseg("bids", dataset, out, "participant", "--jobs", "1")
    volseg("bids", dataset, out, "group")
    return out


def save_head(head: Path, path: Path, *, crop: bool) -> None:
    """Write a drawn head under another name, whole or without its top."""
    if path.exists():
        return
    image = nib.load(head)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image.slicer[:, :, :-CROPPED_SLICES] if crop else image, path)


def dicom_results(head: Path, work: Path) -> Path:
    """Return the results of a DICOM exam: a sagittal series of a head, a localiser, a picture."""
    from dicom_files import make_localiser, make_series

    folder, out = work / "exam", work / "exam_out"
    if not folder.exists():
        # (slices from the left, rows from the top, columns from the front)
        array = read(head).array[::EVERY, ::-1, ::-1].transpose(0, 2, 1)
        array = (array - array.min()) / np.ptp(array) * STORED_MAX
        series = make_series(count=len(array), angles=(0, 0, 0))
        for number, item in enumerate(series.slices):
            place_sagittal(item.dataset, number, array[number])
            item.name = f"t1/{item.name}-{number}"
        series.write(folder)
        make_localiser().write(folder / "localiser")
        pictures = make_series(1, count=1)
        capture = "1.2.840.10008.5.1.4.1.1.7"
        pictures.change(lambda number, item: setattr(item, "SOPClassUID", capture))
        pictures.write(folder / "pictures")
    volseg("segment", folder, "-o", out, "--dicom-seg", "--jobs", "1")
    return out


def place_sagittal(dataset: Any, number: int, pixels: Array) -> None:
    """Make a dataset a sagittal slice; slices go from left to right, LPS."""
    dataset.ImageOrientationPatient = ["0", "1", "0", "0", "0", "-1"]
    dataset.ImagePositionPatient = [str(80 - SLICE_MM * number), "-100", "100"]
    dataset.PixelSpacing, dataset.SliceThickness = [str(SPACING_MM)] * 2, str(SLICE_MM)
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.PixelData = np.rint(pixels).astype(np.uint16).tobytes()


def volseg(*words: str | Path) -> None:
    """Run a command of volseg."""
    subprocess.run([sys.executable, "-m", "pipeline.cli", *map(str, words)], check=True)


def report_pictures(page: Page, out: Path) -> None:
    """Take the pictures of a report: its cases, one in the viewer, its volumes."""
    index = write_batch_report(out, options=ReportOptions(viewer="all"))
    open_report(page, index, "derivatives/volseg")
    page.press("p")
    page.press("p")
    page.run("openCase(state.cases.find(row => row.mosaic && row.warnings.length))")
    save(page, "report_cases")
    page.press("v")
    page.wait("document.querySelector('#viewer-box').dataset.ready")
    save(page, "report_viewer")
    page.click("#tab-volumes")
    save(page, "report_volumes")


def open_report(page: Page, index: Path, name: str) -> None:
    """Open a report; in pictures the output folder has a name instead of a path of this machine."""
    page.open(index.as_uri())
    page.wait("document.documentElement.dataset.ready")
    page.run(f"document.getElementById('folder').textContent = {json.dumps(name)}")


def exam_picture(page: Page, out: Path, work: Path) -> None:
    """Take a picture of the report of an exam, at a series that was left out."""
    index = write_batch_report(out, options=ReportOptions(viewer="none"))
    open_report(page, index, "out")
    page.run("openCase(state.cases.find(row => row.message.includes('orientations')))")
    page.run(
        "for (const cell of document.querySelectorAll('#detail td'))"
        f"cell.textContent = cell.textContent.replace({json.dumps(f'{work}/')}, '')"
    )
    save(page, "dicom_exam")


def table_page(table: Path, path: Path) -> Path:
    """Write some columns of a table as a page."""
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    head = "".join(f"<th>{name}</th>" for name in TABLE_COLUMNS)
    lines = ["".join(_cell(row[name]) for name in TABLE_COLUMNS) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    title = f"<h1>{table.name}, some of its columns</h1>"
    return _write_page(path, f"{title}<table><tr>{head}</tr>{body}</table>")


def _cell(text: str) -> str:
    number = text.replace(".", "").isdigit()
    return f"<td{' class=number' if number else ''}>{html.escape(text)}</td>"


def overlay_page(exam: Path, out: Path, path: Path) -> Path:
    """Write frames of a DICOM segmentation over those of its source as a page."""
    from PIL import Image

    for number, picture in enumerate(overlays(exam, out)):
        Image.fromarray(picture).save(path.with_name(f"frame{number}.png"))
    images = "".join(f"<img src=frame{number}.png width=300>" for number in range(SHOWN_FRAMES))
    style = f"background:black;font-size:0;width:{300 * SHOWN_FRAMES}px"
    return _write_page(path, f"<main style='{style}'>{images}</main>")


def overlays(exam: Path, out: Path) -> Iterator[Array]:
    """Yield (rows, columns, 3) frames of a series with the colours of its segments.

    The places and the colours are read from the DICOM objects, as a viewer reads them.
    """
    import highdicom as hd
    from pydicom import dcmread

    (found,) = out.glob("*_seg.dcm")
    segmentation = hd.seg.segread(found)
    headers = [dcmread(file) for file in (exam / "t1").iterdir()]
    headers.sort(key=lambda header: float(header.ImagePositionPatient[0]))
    top = np.percentile([header.pixel_array for header in headers], WHITE_PERCENTILE)
    colors = [(0.0, 0.0, 0.0)]
    for segment in segmentation.SegmentSequence:
        lab = hd.color.CIELabColor.from_dicom_value(tuple(segment.RecommendedDisplayCIELabValue))
        colors.append(lab.to_rgb())
    table = np.array(colors)
    middle = len(headers) // 2
    for place in range(middle + 1, middle + 1 + 4 * SHOWN_FRAMES, 4):
        header = headers[place]
        numbers = segmentation.get_pixels_by_source_instance(
            [header.SOPInstanceUID], combine_segments=True
        )[0]
        far = distance_transform_edt(numbers == 0, sampling=SPACING_MM) > SHOWN_MM
        grey = np.where(far, 0, (header.pixel_array / top).clip(max=1) * 255)
        grey = grey[..., np.newaxis].repeat(3, axis=2)
        mixed = np.where(numbers[..., np.newaxis] > 0, 0.45 * grey + 0.55 * table[numbers], grey)
        yield mixed.astype(np.uint8)


def _write_page(path: Path, body: str) -> Path:
    text = f"<!doctype html><meta charset=utf-8><style>{TABLE_STYLE}</style>{body}"
    path.write_text(text, encoding="utf-8")
    return path


def save(page: Page, name: str, selector: str = "") -> None:
    """Write a picture of the window, or of an element, once it has been drawn."""
    time.sleep(1)
    options: dict[str, Any] = {}
    if selector:
        box = page.run(
            f"(() => {{ const box = document.querySelector('{selector}').getBoundingClientRect();"
            "return [box.x, box.y, box.width, box.height]; })()"
        )
        x, y, width, height = (float(value) for value in box)
        options["clip"] = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
        options["captureBeyondViewport"] = True
    picture = page.screenshot(image_format="webp", quality=QUALITY, **options)
    (IMAGES / f"{name}.webp").write_bytes(picture)


if __name__ == "__main__":
    main()
