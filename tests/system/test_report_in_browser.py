"""The report and the viewer in headless Chromium: what a reader sees, and that nothing leaves."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_folders import record_of, store
from phantom import load_script, save
from PIL import Image as Picture
from report_batch import BELOW, CENTRES, FRONT, LABELS, LEFT, RIGHT, add_case, head

from pipeline.io import label_table
from pipeline.report import ReportOptions, view_files, write_batch_report
from pipeline.types import Array

pytestmark = pytest.mark.system
COLORS = {label.value: np.array(label.color) for label in label_table(LABELS)}
CASES = 10_000
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def browser() -> Any:
    """scripts/browser.py, where Chromium is installed."""
    module = load_script("browser")
    if module.find_chromium() is None:
        pytest.skip("chromium is not installed: scripts/test-system installs it")
    return module


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    folder = tmp_path / "downloads"
    folder.mkdir()
    return folder


@pytest.fixture
def page(browser: Any, downloads: Path) -> Iterator[Any]:
    """A page that at the end has asked for nothing else and has shown no error."""
    with browser.open_page(downloads=downloads) as opened:
        opened.resize(1280, 900)
        yield opened
        assert opened.problems == []
        assert opened.foreign_requests() == []


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    for name, volume in (("b", 2000.0), ("a", 3000.0), ("c", 1000.0)):
        add_case(folder, name, volumes_mm3={"left thalamus": volume}, warnings=(HOSTILE,))
    store(folder, record_of("d", status="failed", error="no such file", volumes_mm3={}))
    return folder


def open_report(page: Any, folder: Path, **options: Any) -> None:
    index = write_batch_report(folder, options=ReportOptions(**options))
    page.open(index.as_uri())
    page.wait("document.documentElement.dataset.ready")


def cases_shown(page: Any) -> list[str]:
    found: list[str] = page.run(
        "[...document.querySelectorAll('.row .case')].map(x => x.textContent)"
    )
    return found


def choose(page: Any, element: str, value: str) -> None:
    page.run(
        f"document.getElementById('{element}').value = '{value}';"
        f"document.getElementById('{element}').dispatchEvent(new Event('change'))"
    )


def picture_of(page: Any, selector: str) -> Array:
    """(H, W, 3) pixels of an element as it is on the screen."""
    box = page.run(
        f"(() => {{ const box = document.querySelector('{selector}').getBoundingClientRect();"
        "return [box.x, box.y, box.width, box.height]; })()"
    )
    with Picture.open(io.BytesIO(page.screenshot())) as picture:
        whole = np.asarray(picture.convert("RGB")).astype(int)
    left, top, width, height = (round(value) for value in box)
    return whole[top : top + height, left : left + width]


def middle_of(
    picture: Array, color: Array, share: float = 1.0, tolerance: int = 12
) -> Array | None:
    """Row and column, as fractions, of the middle of the pixels whose hue is a colour's."""
    near = (np.abs(picture - share * color) <= tolerance).all(axis=-1)
    found = np.argwhere(near)
    return None if len(found) < 5 else found.mean(axis=0) / picture.shape[:2]


def test_the_table_sorts_and_filters(page: Any, out: Path) -> None:
    open_report(page, out)
    assert cases_shown(page) == ["a", "b", "c", "d"]
    page.click(".head [data-key=case] button")
    assert cases_shown(page) == ["d", "c", "b", "a"]
    choose(page, "structure", "0")
    page.click(".head [data-key=volume0] button")
    assert cases_shown(page) == ["a", "b", "c", "d"]  # large first, the one without a volume last
    choose(page, "show", "failures")
    assert cases_shown(page) == ["d"]
    assert "no such file" in page.run("document.getElementById('detail').textContent")
    choose(page, "show", "all")
    page.press("/")
    page.type("onerror")
    assert cases_shown(page) == ["a", "b", "c"]


def test_series_that_were_left_out(page: Any, out: Path) -> None:
    """They are counted, chosen and shown with their reason; the ends of long names are visible."""
    uids = [f"1.2.826.0.1.3680043.8.498.{'7' * 30}{number}" for number in range(2)]
    reason = "slices of 3 orientations"
    nothing: dict[str, Any] = {"volumes_mm3": {}, "inputs": ()}
    store(out, *(record_of(uid, status="left out", error=reason, **nothing) for uid in uids))
    store(out, record_of("e", status="quarantined", error="the process died", **nothing))
    open_report(page, out)
    assert "2 left out" in page.run("document.getElementById('counts').textContent")
    choose(page, "show", "left out")
    assert cases_shown(page) == uids
    assert reason in page.run("document.getElementById('detail').textContent")
    ends = page.run(
        "[...document.querySelectorAll('.row .case .end')].map(end => {"
        "const inner = end.getBoundingClientRect(), cell = end.parentNode.getBoundingClientRect();"
        "return inner.width > 20 && inner.right <= cell.right; })"
    )
    assert ends == [True, True]
    choose(page, "show", "failures")
    assert cases_shown(page) == ["d", "e"]
    parts = page.run("document.querySelector('.row:last-child .status').scrollWidth")
    assert parts <= page.run("document.querySelector('.row:last-child .status').clientWidth")


def test_cases_with_a_low_predicted_dice_come_first(page: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, dice in {"a": 0.9, "b": 0.6}.items():
        predicted = {"mean": {"dice": dice, "low": 0.5, "high": 1.0}, "labels": {}}
        store(out, record_of(name, outputs=(), predicted_dice=predicted))
    store(out, record_of("c", outputs=()))
    open_report(page, out)
    assert cases_shown(page) == ["b", "a", "c"]


def test_text_of_a_batch_stays_text(page: Any, out: Path) -> None:
    open_report(page, out)
    assert HOSTILE in page.run("document.getElementById('detail').textContent")
    assert page.run("document.querySelectorAll('img[src=x]').length") == 0


def test_the_focus_stays_at_the_button(page: Any, out: Path) -> None:
    """By the keyboard: a heading sorts twice, a case is marked and unmarked, cases are stepped."""
    open_report(page, out)
    focused = "[document.activeElement.tagName, document.activeElement.name]"
    for selector in (".head [data-key=status] button", ".marking .fail", "[name='Next case']"):
        page.run(f'document.querySelector("{selector}").focus()')
        before = page.run(focused)
        page.press("Home")
        for _ in range(2):
            page.run("document.activeElement.click()")
            assert page.run(focused) == before
    assert page.run("document.querySelector('.head [data-key=status]').ariaSort") == "descending"
    page.run("document.activeElement.click()")  # at the last case the button is disabled
    assert page.run("document.activeElement.id") == "grid"


def test_marks_are_kept_and_exported(page: Any, out: Path, downloads: Path) -> None:
    """By key and mouse; after a reload they are there."""
    open_report(page, out)
    page.press("p")  # a, and on to b
    page.press("f")  # b, and on to c
    page.press("n")
    page.type("tilted\thead")
    page.press("Escape")
    page.click(".marking .fail")
    open_report(page, out)
    page.click("#export")
    file = downloads / "marks.tsv"
    deadline = time.monotonic() + 30
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    rows = [line.split("\t")[:4] for line in file.read_text().splitlines()]
    assert rows == [
        ["case", "mark", "note", "status"],
        ["a", "pass", "", "done"],
        ["b", "fail", "", "done"],
        ["c", "fail", "tilted head", "done"],
    ]


def test_outlines_lie_where_they_belong(page: Any, out: Path) -> None:
    """On the screen, over the scan; the key takes them away."""
    open_report(page, out)
    page.wait("[...document.querySelectorAll('.mosaic img')].every(x => x.complete)")
    shown = picture_of(page, ".mosaic")
    page.press("o")
    page.wait("document.querySelector('.outlines').hidden")
    bare = picture_of(page, ".mosaic")
    changed = np.abs(shown - bare).sum(axis=-1) > 60
    assert changed.mean() > 0.005
    green = changed & (np.argmax(shown, axis=-1) == 1) & (shown[..., 1] - shown[..., 0] > 40)
    pink = changed & (shown[..., 0] - shown[..., 1] > 60)
    axial = slice(0, shown.shape[0] // 3)
    width = shown.shape[1] / 6
    columns = {
        name: np.argwhere(mask[axial])[:, 1] for name, mask in {"L": green, "R": pink}.items()
    }
    # of each panel: left on the right half, right on the left half
    assert ((columns["L"] % width) > width / 2).mean() > 0.95
    assert ((columns["R"] % width) < width / 2).mean() > 0.95


def check_viewer(page: Any, selector: str) -> None:
    """Each label is in its colour, at its place, in the coronal slice through its middle."""
    for value in (LEFT, RIGHT, BELOW):
        page.run(f"volsegViewer.setSliceType(1); volsegViewer.setOpacity(1, 1); {to_label(value)}")
        time.sleep(0.4)
        drawn = picture_of(page, selector)
        row, column = (
            middle if (middle := middle_of(drawn, COLORS[value])) is not None else (-1, -1)
        )
        if value == LEFT:
            assert column > 0.52
        if value == RIGHT:
            assert 0 <= column < 0.48
        if value == BELOW:
            assert row > 0.52
    page.run(f"volsegViewer.setSliceType(0); {to_label(FRONT)}")
    time.sleep(0.4)
    middle = middle_of(picture_of(page, selector), COLORS[FRONT])
    assert middle is not None
    assert middle[0] < 0.48  # anterior is at the top


def to_label(value: int) -> str:
    """A script that moves the crosshair to the middle of a label."""
    number = sorted(CENTRES).index(value) + 1
    return (
        "(() => { const labels = volsegViewer.volumes[1], size = labels.dimsRAS, found = [0, 0, 0];"
        "let count = 0; const image = labels.img, [x, y, z] = labels.hdr.dims.slice(1, 4);"
        f"for (let i = 0; i < image.length; i += 1) if (image[i] === {number}) {{ count += 1;"
        "found[0] += i % x; found[1] += Math.floor(i / x) % y;"
        "found[2] += Math.floor(i / (x * y)); }"
        "volsegViewer.scene.crosshairPos = [found[0] / count / x, found[1] / count / y,"
        "found[2] / count / z]; volsegViewer.drawScene(); })()"
    )


def test_the_viewer_of_the_report(page: Any, out: Path) -> None:
    """Labels at the expected place, in the colours of the table, left on the right."""
    open_report(page, out, viewer="all")
    page.press("v")
    page.wait("document.querySelector('#viewer-box').dataset.ready")
    check_viewer(page, "#viewer-box canvas")
    page.press("v")
    page.wait("document.querySelector('#viewer-box').hidden")


def test_volseg_view(page: Any, tmp_path: Path) -> None:
    scan, labels = head()
    server = view_files(
        save(tmp_path / "scan.nii.gz", scan), save(tmp_path / "labels.nii.gz", labels)
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        page.open(server.url)
        page.wait("document.querySelector('#viewer').dataset.ready")
        assert page.run("document.title") == "scan.nii.gz"
        left = picture_of(page, "#viewer canvas")
        assert left.max() > 100
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_ten_thousand_cases(page: Any, tmp_path: Path) -> None:
    """Few rows are in the page at a time, and the last one is reached by a key."""
    random = np.random.default_rng(0)
    volumes = 4000 * np.exp(0.1 * random.normal(size=(CASES, 30)))
    records = [
        record_of(
            f"sub-{number:05}",
            outputs=(),
            volumes_mm3={f"structure {n}": float(v) for n, v in enumerate(volumes[number])},
        )
        for number in range(CASES)
    ]
    folder = store(tmp_path / "out", *records).root
    index = write_batch_report(folder)
    page.open(index.as_uri())
    page.wait("document.querySelectorAll('.row').length > 10")
    assert page.run("document.querySelectorAll('.row').length") < 100
    page.press("End")
    page.wait(
        "document.querySelector('.row[aria-selected=true] .case').textContent === 'sub-09999'"
    )
    page.press("/")
    page.type("sub-0777")
    assert cases_shown(page) == [f"sub-0777{digit}" for digit in range(10)]
    page.click("#tab-volumes")
    assert page.run("document.querySelectorAll('#volumes canvas').length") == 30


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 1920])
def test_it_is_readable(page: Any, out: Path, width: int, dark: bool) -> None:
    """Contrast of text is at least 4.5; nothing is wider than the window, no heading is cut."""
    page.resize(width, 900, dark=dark)
    open_report(page, out)
    assert page.run("document.documentElement.scrollWidth") <= width
    cut = "x => x.scrollWidth > x.clientWidth"
    parts = "[...document.querySelectorAll('.head .start, .cell.status')]"
    assert page.run(f"{parts}.length") > 5
    assert not page.run(f"{parts}.some({cut})")
    for name in ("text", "quiet", "bad", "warn", "good", "accent"):
        for ground in ("ground", "raised"):
            assert contrast(page, name, ground) >= 4.5, (name, ground)
    assert contrast(page, "edge", "ground") >= 3  # borders of controls
    for ground in ("ground", "band"):
        assert contrast(page, "bar", ground) >= 3  # points of plots


def contrast(page: Any, first: str, second: str) -> float:
    """The contrast of two colours of the page, as WCAG defines it."""
    light = []
    for name in (first, second):
        text = page.run(
            f"getComputedStyle(document.documentElement).getPropertyValue('--{name}').trim()"
        )
        rgb = np.array(list(bytes.fromhex(text.lstrip("#")))) / 255
        linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
        light.append(float(linear @ (0.2126, 0.7152, 0.0722)))
    return (max(light) + 0.05) / (min(light) + 0.05)
