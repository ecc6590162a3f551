from __future__ import annotations

import csv
import gzip
import io
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from monai.transforms import LoadImage
from nibabel.gifti.parse_gifti_fast import GiftiImageParser

from pipeline.config.spec import load_spec
from pipeline.io.label_files import (
    LABEL_FILES,
    caret_xml,
    dseg_text,
    freesurfer_text,
    itksnap_text,
    slicer_text,
    write_label_files,
)
from pipeline.io.label_table import label_table
from pipeline.io.reader import read
from pipeline.io.writer import as_nibabel, write_labels
from pipeline.types import Affine, LabelMap

ROOT = Path(__file__).parents[2]
BRAIN = load_spec(ROOT / "bundles/brain_mr_structures/configs/spec.yaml").labels
ODD = {
    "background": 0,
    'left "x" ]]> & <b>\ty\nz': 1,
    "#1 \x07 \ud800": 70,
    "Größe µ": 3,
    "large": 2**16,
    "larger": 2**32 - 1,
}
VOX_OFFSET = {348: slice(108, 112), 540: slice(168, 176)}


def label_map(dtype: str = "uint8") -> tuple[LabelMap, Affine]:
    """Return an oblique label map with all labels of the brain."""
    values = np.array(list(BRAIN.values()), dtype=dtype)
    labels = np.resize(values, (7, 9, 11))
    affine = np.array(
        [[-0.9, 0.1, 0.2, 30], [0.1, 1.2, -0.3, -41], [0.2, 0.3, 2.1, 7], [0, 0, 0, 1]]
    )
    return labels, affine


def input_header(kind: type[nib.Nifti1Header], endianness: str, offset: int) -> bytes:
    """Return a header with all that a label map keeps."""
    header = kind(endianness=endianness)
    header.set_data_shape((7, 9, 11))
    header.set_data_dtype(np.int16)
    header.set_qform(label_map()[1], code=1, strip_shears=True)
    header.set_sform(label_map()[1], code=4)
    header.set_xyzt_units("mm", "sec")
    header["aux_file"] = b"something"
    header["vox_offset"] = offset
    block: bytes = header.binaryblock
    return block


def wrapped(xml: bytes) -> nib.gifti.GiftiLabelTable:
    """Return the label table that nibabel's parser of GIFTI reads."""
    text = xml.decode()
    start, end = text.index("<LabelTable>"), text.index("</LabelTable>")
    gifti = (
        '<?xml version="1.0" encoding="UTF-8"?><GIFTI Version="1.0" NumberOfDataArrays="0">'
        f"{text[start:end]}</LabelTable></GIFTI>"
    )
    parser = GiftiImageParser()
    parser.parse(gifti.encode())
    return parser.img.labeltable


@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("kind", [nib.Nifti1Header, nib.Nifti2Header])
@pytest.mark.parametrize("offset", [0, 1024])
def test_the_extension_changes_where_voxels_begin_and_nothing_else(
    kind: type[nib.Nifti1Header], endianness: str, offset: int
) -> None:
    """Byte by byte: header, then voxels."""
    labels, affine = label_map()
    header = input_header(kind, endianness, offset)
    size = len(header)
    plain = as_nibabel(labels, affine, header).to_bytes()
    xml = caret_xml(label_table(BRAIN))
    named = as_nibabel(labels, affine, header, xml).to_bytes()
    changed = {i for i in range(size) if plain[i] != named[i]}
    assert changed <= set(range(*VOX_OFFSET[size].indices(size)))
    assert changed
    assert (plain[size : size + 4], named[size : size + 4]) == (bytes(4), b"\x01\x00\x00\x00")
    order: Literal["little", "big"] = "little" if endianness == "<" else "big"
    esize, code = (int.from_bytes(named[size + 4 + i : size + 8 + i], order) for i in (0, 4))
    assert (esize, code) == (len(xml) + 8, 30)
    assert named[size + 12 : size + 12 + len(xml)] == xml
    voxels = labels.tobytes(order="F")
    assert named[size + 4 + esize :] == voxels
    assert plain.endswith(voxels)


def test_without_a_header_too() -> None:
    labels, affine = label_map()
    plain = as_nibabel(labels, affine).to_bytes()
    named = as_nibabel(labels, affine, b"", caret_xml(label_table(BRAIN))).to_bytes()
    assert {i for i in range(348) if plain[i] != named[i]} <= set(range(108, 112))


# MONAI's LoadImage makes all its readers, and one of them warns where pydicom is installed
@pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader")
def test_readers_read_the_same_with_and_without(tmp_path: Path) -> None:
    """nibabel, SimpleITK, MONAI and our own reader: voxels, affine and metadata."""
    labels, affine = label_map()
    header = input_header(nib.Nifti1Header, "<", 0)
    paths = [tmp_path / "plain.nii.gz", tmp_path / "named.nii.gz"]
    for path, xml in zip(paths, (b"", caret_xml(label_table(BRAIN))), strict=True):
        write_labels(path, as_nibabel(labels, affine, header, xml))
    plain, named = map(nib.load, paths)
    assert np.array_equal(np.asarray(plain.dataobj), np.asarray(named.dataobj))
    assert np.array_equal(plain.affine, named.affine)
    assert named.header.extensions.get_codes() == [30]
    first, second = (sitk.ReadImage(str(path)) for path in paths)
    assert np.array_equal(sitk.GetArrayViewFromImage(first), sitk.GetArrayViewFromImage(second))
    assert first.GetOrigin() == second.GetOrigin()
    assert first.GetDirection() == second.GetDirection()
    ours = [read(path) for path in paths]
    assert np.array_equal(ours[0].array, ours[1].array)
    assert np.array_equal(ours[0].affine, ours[1].affine)
    loaded = [LoadImage(image_only=True)(path) for path in paths]
    assert np.array_equal(loaded[0], loaded[1])
    assert np.array_equal(loaded[0].affine, loaded[1].affine)


def test_the_same_labels_are_the_same_bytes(tmp_path: Path) -> None:
    labels, affine = label_map()
    for name in ("a", "b"):
        xml = caret_xml(label_table(BRAIN))
        write_labels(tmp_path / f"{name}.nii.gz", as_nibabel(labels, affine, b"", xml))
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.nii.gz").read_bytes()).count(b"<Label Key") == 33


@pytest.mark.parametrize("labels", [BRAIN, ODD])
def test_nibabel_reads_the_table(labels: dict[str, int]) -> None:
    """By its parser of GIFTI, whose label tables are the same."""
    table = [label for label in label_table(labels) if label.value < 2**31]
    found = wrapped(caret_xml(label_table(labels))).labels
    assert [label.key for label in found] == [label.value for label in table]
    for label, row in zip(found, table, strict=True):
        assert np.allclose(np.array(label.rgba) * 255, row.rgba, atol=1e-3)
        if row.value and row.name.isprintable():
            assert label.label == row.name
    assert found[0].label == "???"


@pytest.mark.parametrize("seed", range(20))
def test_any_name_makes_an_extension(seed: int) -> None:
    """XML that parses, of an allowed size, without bytes of 0."""
    rng = np.random.default_rng(seed)
    letters = [*map(chr, range(40)), *"<>&]\"'", *map(chr, (0x7F, 0xD800, 0xFFFE, 0x1F600))]
    names = {"".join(rng.choice(letters, size=rng.integers(1, 9))) for _ in range(5)}
    labels = {"background": 0} | {name: i for i, name in enumerate(sorted(names), 1)}
    xml = caret_xml(label_table(labels))
    root = ET.fromstring(xml)
    assert [label.get("Key") for label in root.iter("Label")] == list(map(str, labels.values()))
    assert root.findtext("VolumeInformation/VolumeType") == "Label"
    assert (len(xml) + 8) % 16 == 0
    assert b"\0" not in xml


def test_dseg_columns() -> None:
    """As BIDS has them, with its values of tissues."""
    rows = list(csv.DictReader(io.StringIO(dseg_text(label_table(BRAIN))), delimiter="\t"))
    assert list(rows[0]) == ["index", "name", "abbreviation", "color", "mapping"]
    assert [int(row["index"]) for row in rows] == list(BRAIN.values())
    cortex = next(row for row in rows if row["index"] == "3")
    assert list(cortex.values()) == ["3", "left cerebral cortex", "L-Cx", "#CD3E4E", "8"]
    rows = list(csv.DictReader(io.StringIO(dseg_text(label_table(ODD))), delimiter="\t"))
    assert len(rows) == len(ODD)
    assert [row["mapping"] for row in rows] == ["0", *["n/a"] * 5]


@pytest.mark.parametrize("labels", [BRAIN, ODD])
def test_lists_of_colours_are_read_by_their_grammars(labels: dict[str, int]) -> None:
    """ITK-SNAP: seven numbers and a quoted name; Slicer and FreeSurfer: a number, a word, RGBA."""
    table = {label.value: label for label in label_table(labels) if label.value < 2**16}
    found = {}
    for line in itksnap_text(list(table.values())).splitlines():
        if not line.startswith("#"):
            numbers, name, rest = line.split('"')
            value, *color, opacity, visible, mesh = map(int, numbers.split())
            assert (rest, name.strip() != "") == ("", True)
            assert opacity == visible == mesh == (value > 0)
            found[value] = tuple(color)
    assert found == {value: label.color for value, label in table.items()}
    for text, opaque in ((slicer_text, 255), (freesurfer_text, 0)):
        lines = text(label_table(labels)).splitlines()
        rows = [line.split() for line in lines if not line.startswith("#")]
        assert all(len(row) == 6 for row in rows)
        colors = {int(row[0]): tuple(map(int, row[2:5])) for row in rows}
        assert colors == {value: label.color for value, label in table.items()}
        assert {int(row[5]) for row in rows if row[0] != "0"} == {opaque}
        assert [int(row[0]) for row in rows] == sorted(table)


def test_freesurfer_names() -> None:
    text = freesurfer_text(label_table(BRAIN))
    assert {line.split()[1] for line in text.splitlines()} >= {"Left-Hippocampus", "Unknown"}
    assert slicer_text(label_table(BRAIN)).splitlines()[2] == "0 background 0 0 0 0"


def test_files_are_written_whole_and_equal(tmp_path: Path) -> None:
    for _ in range(2):
        write_label_files(tmp_path, ODD)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(LABEL_FILES)
    before = [(tmp_path / name).read_bytes() for name in LABEL_FILES]
    write_label_files(tmp_path, ODD)
    assert before == [(tmp_path / name).read_bytes() for name in LABEL_FILES]


@pytest.mark.system
@pytest.mark.skipif(shutil.which("wb_command") is None, reason="needs Connectome Workbench")
def test_workbench_reads_names_and_colours(tmp_path: Path) -> None:
    """It takes the file for a label volume without any import, and lists the same labels."""
    labels, affine = label_map()
    path, listed = tmp_path / "a_seg.nii.gz", tmp_path / "list.txt"
    write_labels(path, as_nibabel(labels, affine, b"", caret_xml(label_table(BRAIN))))
    subprocess.run(
        ["wb_command", "-volume-label-export-table", str(path), "1", str(listed)],
        check=True,
        capture_output=True,
    )
    lines = listed.read_text().splitlines()
    found = {}
    for name, numbers in zip(lines[::2], lines[1::2], strict=True):
        value, *rgba = map(int, numbers.split())
        found[value] = (name, *rgba)
    expected = {row.value: (row.name, *row.rgba) for row in label_table(BRAIN) if row.value}
    assert {value: row for value, row in found.items() if value} == expected
