"""The text headers of NRRD and MetaImage files: what their voxels take, and what they leave open.

SimpleITK reads these formats. It takes the memory that a header declares before it looks for the
voxels, and passes over units and missing orientations, so the headers are read here first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from pipeline.io.formats import printable
from pipeline.io.nifti import sides_are_guessed
from pipeline.io.streams import (
    MAX_RATIO,
    check_length,
    check_zlib,
    discard,
    open_bytes,
    too_short,
    unreadable,
)

MAX_HEADER_BYTES = 2**22  # of text: segmentations of hundreds of structures have a few 100 kB
MAX_DATA_FILES = 100_000
MAX_DIMENSIONS = 10  # MetaIO has arrays of this length
SLACK = 2**16  # bytes after the voxels
DATA_FILE = ("data file", "datafile")
RAW, GZIP, ZLIB, TEXT = "raw", "gzip", "zlib", "text"
NRRD_ENCODINGS = {"raw": RAW, "gzip": GZIP, "gz": GZIP, "hex": TEXT}
NRRD_ENCODINGS |= dict.fromkeys(("txt", "text", "ascii"), TEXT)
NRRD_BYTES = dict.fromkeys(("signed char", "int8", "int8_t"), 1)
NRRD_BYTES |= dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), 1)
NRRD_BYTES |= dict.fromkeys(("short", "short int", "signed short", "signed short int"), 2)
NRRD_BYTES |= dict.fromkeys(("int16", "int16_t", "ushort", "unsigned short", "uint16"), 2)
NRRD_BYTES |= dict.fromkeys(("unsigned short int", "uint16_t"), 2)
NRRD_BYTES |= dict.fromkeys(("int", "signed int", "int32", "int32_t", "uint"), 4)
NRRD_BYTES |= dict.fromkeys(("unsigned int", "uint32", "uint32_t", "float"), 4)
NRRD_BYTES |= dict.fromkeys(("longlong", "long long", "long long int", "signed long long"), 8)
NRRD_BYTES |= dict.fromkeys(("signed long long int", "int64", "int64_t", "ulonglong"), 8)
NRRD_BYTES |= dict.fromkeys(("unsigned long long", "unsigned long long int", "uint64"), 8)
NRRD_BYTES |= dict.fromkeys(("uint64_t", "double"), 8)
META_BYTES = dict.fromkeys(("MET_CHAR", "MET_UCHAR", "MET_ASCII_CHAR"), 1)
META_BYTES |= dict.fromkeys(("MET_SHORT", "MET_USHORT"), 2)
META_BYTES |= dict.fromkeys(("MET_INT", "MET_UINT", "MET_FLOAT", "MET_LONG", "MET_ULONG"), 4)
META_BYTES |= dict.fromkeys(("MET_LONG_LONG", "MET_ULONG_LONG", "MET_DOUBLE"), 8)
# spaces whose axes have sides; scanner-xyz and the like have none
ANATOMICAL_SPACE = re.compile(r"(ras|las|lps)t?|(right|left)-(anterior|posterior)-superior(-time)?")
UNITS = re.compile(r'"([^"]*)"')
FILE_PATTERN = re.compile(rb"[^%]*%0?\d{0,2}[du][^%]*")
MM_PER_UNIT = dict.fromkeys(("m", "meter", "meters", "metre", "metres"), 1000.0)
MM_PER_UNIT |= dict.fromkeys(("um", "µm", "μm", "micron", "microns"), 0.001)
MM_PER_UNIT |= dict.fromkeys(("micrometer", "micrometers", "micrometre", "micrometres"), 0.001)
MM_PER_UNIT |= {"mm": 1.0, "cm": 10.0, "nm": 1e-6}


@dataclass(frozen=True, kw_only=True, slots=True)
class VoxelData:
    """The voxels of a NRRD or MetaImage file, as its header declares them.

    Attributes:
        path: the header.
        files: where the voxels are; the header itself, or others.
        offset: bytes before the voxels in each file, also before a compressed stream; -1 where the
            voxels are the last bytes of the file.
        skipped: bytes to skip after decompression.
        values: number of values, of all volumes and components.
        bytes_per_value: size of one.
        encoding: one of RAW, GZIP, ZLIB, TEXT.
        doubts: warnings about the header.
        mm_per_unit: length of the unit along each axis of the world, mm.
    """

    path: Path
    files: tuple[Path, ...]
    offset: int
    skipped: int
    values: int
    bytes_per_value: int
    encoding: str
    doubts: tuple[str, ...]
    mm_per_unit: tuple[float, ...]

    @property
    def declared_bytes(self) -> int:
        """Bytes of all values, decompressed."""
        return self.values * self.bytes_per_value

    def check_room(self) -> None:
        """Check by the sizes of the files alone that they can hold the voxels.

        Raises:
            ReadError: they are missing, too short, or too long.
        """
        sizes = [_size(self.path, file) for file in self.files]
        room = sum(size - max(self.offset, 0) for size in sizes)
        needed = self.skipped * len(self.files) + self.declared_bytes
        if self.encoding == TEXT:
            needed = 2 * self.values - 1  # at least one character each, and one between two
        if self.encoding in (GZIP, ZLIB):
            room *= MAX_RATIO
        if room < needed:
            raise too_short(self.path, needed, max(room, 0))
        if self.encoding == RAW and len(self.files) == 1 and self.offset >= 0:
            check_length(self.path, room, needed, SLACK)

    def check_content(self) -> None:
        """Check compressed voxels: their checksum, and that they are as many as declared.

        Raises:
            ReadError: they are fewer or more.
            EOFError, OSError, zlib.error: they are truncated or damaged.
        """
        end = self.skipped * len(self.files) + self.declared_bytes
        if self.encoding == ZLIB:
            (file,) = self.files  # `metaimage_data` refuses several
            check_zlib(file, self.offset, end)
        if self.encoding == GZIP:
            found = 0
            for file in self.files:
                with open_bytes(file, self.offset) as stream:
                    found += discard(stream, end + SLACK + 1 - found)
            check_length(self.path, found, end, SLACK)


def nrrd_data(path: Path) -> VoxelData:
    """Return what the header of a NRRD file declares.

    Raises:
        ReadError: it lacks a field, or a field cannot be understood.
    """
    lines = _Lines(path)
    if not next(lines, b"").startswith(b"NRRD"):
        raise unreadable(path, "it does not begin with NRRD")
    fields: dict[str, bytes] = {}
    for line in lines:
        if not line:
            break
        name, colon, value = line.partition(b":")
        if not colon or line.startswith(b"#") or value.startswith(b"="):
            continue
        key = name.strip().lower().decode("latin-1")
        fields[key] = value.strip()
        if key in DATA_FILE and fields[key].upper().startswith(b"LIST"):
            break  # the names of the files follow
    sizes = _integers(path, fields, "sizes")
    if _integers(path, fields, "dimension") != [len(sizes)]:
        raise unreadable(path, f"its dimension is not the number of its sizes, {len(sizes)}")
    _check_sizes(path, sizes)
    encoding = NRRD_ENCODINGS.get(_text(fields, "encoding"))
    value_bytes = NRRD_BYTES.get(_text(fields, "type"))
    if encoding is None or value_bytes is None:
        raise unreadable(
            path,
            f"its encoding is {_text(fields, 'encoding')!r}, expected raw, gzip, ascii or hex; its "
            f"type {_text(fields, 'type')!r}, expected one of numbers",
        )
    files, offset = _nrrd_files(path, fields, lines)
    skip = int(fields.get("byte skip", fields.get("byteskip", b"0")))
    raw = encoding == RAW
    return VoxelData(
        path=path,
        files=files,
        offset=-1 if raw and skip < 0 else offset + (max(skip, 0) if raw else 0),
        skipped=0 if raw else max(skip, 0),
        values=prod(sizes),
        bytes_per_value=value_bytes,
        encoding=encoding,
        doubts=_nrrd_doubts(fields),
        mm_per_unit=_nrrd_units(fields),
    )


def _nrrd_files(
    path: Path, fields: dict[str, bytes], lines: _Lines
) -> tuple[tuple[Path, ...], int]:
    """Return the files with the voxels, and the bytes before them."""
    value = next((fields[key] for key in DATA_FILE if key in fields), None)
    if value is None:
        return (path,), lines.position
    return _data_files(path, value, lines), 0


def _nrrd_doubts(fields: dict[str, bytes]) -> tuple[str, ...]:
    if "space directions" in fields and ANATOMICAL_SPACE.fullmatch(_text(fields, "space")):
        return ()
    missing = [name for name in ("space", "space directions") if name not in fields]
    found = f"no {' and '.join(missing)}" if missing else f"the space is {_text(fields, 'space')}"
    return (sides_are_guessed(f"no orientation is stored ({found})"),)


def _nrrd_units(fields: dict[str, bytes]) -> tuple[float, ...]:
    text = fields.get("space units", fields.get("units", b"")).decode("utf-8", "replace")
    factors = [MM_PER_UNIT.get(unit.strip(), 0.0) for unit in UNITS.findall(text)]
    known = tuple(factor for factor in factors if factor)
    return known if len(known) == 3 else (1.0, 1.0, 1.0)


def metaimage_data(path: Path) -> VoxelData:
    """Return what the header of a MetaImage file declares.

    Raises:
        ReadError: it lacks a field, or a field cannot be understood.
    """
    lines = _Lines(path)
    fields: dict[str, bytes] = {}
    for line in lines:
        name, equals, value = line.partition(b"=")
        key = name.strip().decode("latin-1")
        if equals:
            fields[key.lower()] = value.strip()
        if key.lower() == "elementdatafile":
            break
    sizes = _integers(path, fields, "dimsize")
    if _integers(path, fields, "ndims") != [len(sizes)]:
        raise unreadable(path, f"its NDims is not the number of sizes in DimSize, {len(sizes)}")
    _check_sizes(path, sizes)
    value_bytes = META_BYTES.get(_text(fields, "elementtype").upper())
    if value_bytes is None:
        raise unreadable(path, f"its ElementType is {_text(fields, 'elementtype')!r}")
    files, offset = _meta_files(path, fields, lines)
    encoding = _meta_encoding(fields)
    if encoding == ZLIB and len(files) > 1:
        raise unreadable(path, f"it is compressed in {len(files)} files, expected one")
    header_size = int(fields.get("headersize", b"0"))
    channels = int(fields.get("elementnumberofchannels", b"1"))
    if channels < 1:
        raise unreadable(path, f"its ElementNumberOfChannels is {channels}, expected 1 or more")
    return VoxelData(
        path=path,
        files=files,
        offset=-1 if header_size < 0 else max(offset, header_size),
        skipped=0,
        values=prod(sizes) * channels,
        bytes_per_value=value_bytes,
        encoding=encoding,
        doubts=_meta_doubts(fields),
        mm_per_unit=(MM_PER_UNIT.get(_text(fields, "distanceunits"), 1.0),) * 3,
    )


def _meta_files(
    path: Path, fields: dict[str, bytes], lines: _Lines
) -> tuple[tuple[Path, ...], int]:
    value = fields.get("elementdatafile", b"")
    if not value:
        raise unreadable(path, "its header has no ElementDataFile")
    if value.lower() == b"local":
        return (path,), lines.position
    return _data_files(path, value, lines), 0


def _meta_encoding(fields: dict[str, bytes]) -> str:
    if fields.get("compresseddata", b"").upper().startswith((b"T", b"1")):
        return ZLIB
    binary = fields.get("binarydata", b"").upper().startswith((b"T", b"1"))
    return RAW if binary else TEXT


def _meta_doubts(fields: dict[str, bytes]) -> tuple[str, ...]:
    if {"transformmatrix", "rotation", "orientation"} & set(fields):
        return ()
    acronym = _text(fields, "anatomicalorientation").upper()
    if acronym == "RAI":  # the axes that ITK assumes
        return ()
    found = "no TransformMatrix"
    if acronym.strip("?"):
        found += f", and AnatomicalOrientation {acronym} is not used"
    return (sides_are_guessed(f"no orientation is stored ({found})"),)


class _Lines:
    """The lines of a text header, without their ends, up to a limit.

    Attributes:
        position: bytes of the file that have been read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.position = path, 0
        self._lines = self._read()

    def __iter__(self) -> Iterator[bytes]:
        return self._lines

    def __next__(self) -> bytes:
        return next(self._lines)

    def _read(self) -> Iterator[bytes]:
        with open(self.path, "rb") as file:
            while line := file.readline(MAX_HEADER_BYTES):
                self.position += len(line)
                if self.position > MAX_HEADER_BYTES:
                    raise unreadable(
                        self.path, f"its header does not end within {MAX_HEADER_BYTES} bytes"
                    )
                yield line.rstrip(b"\r\n")


def _text(fields: dict[str, bytes], name: str) -> str:
    return fields.get(name, b"").decode("utf-8", "replace").strip().lower()


def _integers(path: Path, fields: dict[str, bytes], name: str) -> list[int]:
    words = fields.get(name, b"").split()
    if not words or not all(word.isdigit() and len(word) < 19 for word in words):
        found = fields.get(name, b"nothing").decode("latin-1")
        raise unreadable(path, f"its {name} is {printable(found)[:80]}, expected whole numbers")
    return [int(word) for word in words]


def _check_sizes(path: Path, sizes: list[int]) -> None:
    if len(sizes) > MAX_DIMENSIONS or not all(sizes):
        raise unreadable(path, f"its sizes are {sizes}, expected up to {MAX_DIMENSIONS}, above 0")


def _data_files(path: Path, value: bytes, lines: _Lines) -> tuple[Path, ...]:
    """Return the files that a header names: listed on its next lines, numbered, or a single one."""
    if value.upper().startswith(b"LIST"):
        return _beside(path, [line for line in lines if line])
    return _beside(path, _numbered(path, value))


def _numbered(path: Path, value: bytes) -> list[bytes]:
    """Return the names of one file, or of files numbered as in `slice%03d.raw 1 20 1`."""
    pattern, *numbers = value.split()
    if b"%" not in value or not numbers:
        return [value]
    if not FILE_PATTERN.fullmatch(pattern) or not all(word.isdigit() for word in numbers[:3]):
        raise unreadable(path, f"its data files are {printable(os.fsdecode(value))}")
    first, last, step = [int(word) for word in numbers[:3]] + [1] * (3 - len(numbers[:3]))
    if step < 1 or (last - first) // step >= MAX_DATA_FILES:
        raise unreadable(path, f"its data files are {printable(os.fsdecode(value))}")
    return [pattern % number for number in range(first, last + 1, step)]


def _beside(path: Path, names: list[bytes]) -> tuple[Path, ...]:
    """Return data files, whose names are relative to the header's folder."""
    if not 0 < len(names) <= MAX_DATA_FILES:
        raise unreadable(path, f"its header names {len(names)} data files")
    return tuple(path.parent / os.fsdecode(name) for name in names)


def _size(path: Path, file: Path) -> int:
    if b"\0" in os.fsencode(file) or not file.is_file():
        raise unreadable(path, f"its data file {printable(file)} is missing")
    return file.stat().st_size
