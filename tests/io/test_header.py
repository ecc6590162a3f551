"""Headers: read as the volume is read, within bounds, and never trusted for their sizes."""

from __future__ import annotations

import gzip
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import scipy.io
import SimpleITK as sitk
from phantom import SHAPE, nifti, oblique, save, smooth

from pipeline.errors import PipelineError, ReadError, VolumeError
from pipeline.io import printable, read, read_header, source_files
from pipeline.types import Array

ENDINGS = (".nii", ".nii.gz", ".hdr", ".img.gz", ".mgh", ".mgz")
SITK_ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")


def write(path: Path, array: Array | None = None, *, compressed: bool = True) -> Path:
    """Write a volume in the format of the path's suffix."""
    array = smooth() if array is None else array
    if path.suffix in SITK_ENDINGS:
        image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose()))
        image.SetSpacing((0.9, 1.3, 2.1))
        plain = path.parent / f"a{path.suffix}"
        sitk.WriteImage(image, str(plain), useCompression=compressed)
        os.rename(plain, path)
    elif ".mg" in path.name:
        path.write_bytes(pack(path, nib.MGHImage(array, oblique()).to_bytes()))
    elif path.name.endswith((".nii", ".nii.gz")):
        path.write_bytes(pack(path, nifti(array).to_bytes()))
    else:
        nib.save(nib.Nifti1Pair(array, oblique()), path)
    return path


def pack(path: Path, content: bytes) -> bytes:
    return gzip.compress(content, 1) if path.name.endswith(("gz", "mgz")) else content


@pytest.mark.parametrize("ending", [*ENDINGS, *SITK_ENDINGS])
@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_the_header_alone_says_what_reading_says(tmp_path: Path, ending: str, dtype: str) -> None:
    """Shape, affine and warnings are equal to the bit; sizes are those of the file."""
    path = write(tmp_path / f"scan{ending}", smooth().astype(dtype))
    header, image = read_header(path), read(path)
    assert header.shape == image.array.shape == SHAPE
    np.testing.assert_array_equal(header.affine, image.affine)
    assert header.warnings == image.warnings == ()
    assert header.nifti == image.header
    assert header.bytes_per_voxel == np.dtype(dtype).itemsize
    assert header.declared_bytes == smooth().astype(dtype).nbytes
    assert header.volumes == 1
    assert header.file_bytes == sum(file.stat().st_size for file in source_files(path))
    np.testing.assert_allclose(header.spacing, np.linalg.norm(image.affine[:3, :3], axis=0))


@pytest.mark.parametrize(
    ("name", "packed"),
    [("a.nii.gz", False), ("a.nii", True), ("a.mgz", False), ("a.mgh", True), ("a.hdr", True)],
)
def test_headers_are_found_by_content_too(tmp_path: Path, name: str, packed: bool) -> None:
    """With a wrong .gz suffix, or without one that the content needs."""
    path = write(tmp_path / name)
    for file in source_files(path):
        content = file.read_bytes()
        plain = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        file.write_bytes(gzip.compress(plain) if packed else plain)
    assert read_header(path).shape == SHAPE
    np.testing.assert_array_equal(read_header(path).affine, read(path).affine)
    np.testing.assert_array_equal(read(path).array, smooth())


@pytest.mark.parametrize("ending", [".nii.gz", ".mgz", ".mha"])
def test_volumes_are_counted(tmp_path: Path, ending: str) -> None:
    """All further axes together; reading needs a number then, the header does not."""
    path = tmp_path / f"scan{ending}"
    if ending == ".mha":
        image = sitk.GetImageFromArray(np.ascontiguousarray(smooth().transpose()))
        sitk.WriteImage(sitk.JoinSeries([image] * 3), str(path))
    else:
        write(path, np.stack([smooth()] * 3, axis=-1))
    header = read_header(path)
    assert (header.shape, header.volumes) == (SHAPE, 3)
    assert header.declared_bytes == 3 * smooth().nbytes
    with pytest.raises(VolumeError, match="holds 3 volumes"):
        read(path)


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mgz"])
def test_one_volume_of_a_series_is_all_that_is_held(
    tmp_path: Path, ending: str, number: int
) -> None:
    """The others are passed over, and the end of the file is still checked."""
    volumes = [smooth((90, 100, 110), seed=i) for i in range(3)]
    path = write(tmp_path / f"scan{ending}", np.stack(volumes, axis=-1))
    read(path, 0)
    tracemalloc.start()
    image = read(path, number, max_bytes=volumes[0].nbytes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(image.array, volumes[number])
    assert peak < 1.5 * volumes[0].nbytes + 2**22


def test_a_header_is_read_from_the_first_bytes(tmp_path: Path) -> None:
    """A large file costs as little as a small one; damage behind the header is not looked for."""
    path = tmp_path / "scan.nii.gz"
    noise = np.random.default_rng(0).integers(0, 255, (100, 200, 300)).astype(np.uint8)
    path.write_bytes(gzip.compress(nifti(noise).to_bytes(), 1))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    read_header(path)
    before = bytes_read()
    tracemalloc.start()
    assert read_header(path).shape == (100, 200, 300)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert bytes_read() - before < 2**20
    assert peak < 2**20
    with pytest.raises(ReadError, match="it is truncated"):
        read(path)


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def _nifti_with(offset: int, content: bytes, kind: Any = nib.Nifti1Image) -> bytes:
    found = bytearray(kind(smooth(), oblique()).to_bytes())
    found[offset : offset + len(content)] = content
    return bytes(found)


def _text(content: bytes, old: bytes, new: bytes) -> bytes:
    assert old in content
    return content.replace(old, new)


def _sitk_bytes(folder: Path, ending: str, *, compressed: bool) -> bytes:
    return write(folder / f"source{ending}", compressed=compressed).read_bytes()


HUGE = np.array([1000, 1000, 1000], "<i2").tobytes()  # 4 GB of float32
DECLARING: dict[str, Callable[[Path], bytes]] = {
    "a.nii": lambda _: _nifti_with(42, HUGE),
    "a.nii.gz": lambda _: gzip.compress(_nifti_with(42, HUGE)),
    "b.nii": lambda _: _nifti_with(
        24, np.array([2**20, 2**20, 2**20], "<i8").tobytes(), nib.Nifti2Image
    ),
    "c.nii": lambda _: _nifti_with(108, np.float32(1e12).tobytes()),
    "a.mgh": lambda _: _mgh_with(np.array([1000, 1000, 1000], ">i4").tobytes()),
    "a.mgz": lambda _: gzip.compress(_mgh_with(np.array([1000, 1000, 1000], ">i4").tobytes())),
    "a.nrrd": lambda x: _text(
        _sitk_bytes(x, ".nrrd", compressed=False), b"17 24 21", b"1000 1000 1000"
    ),
    "b.nrrd": lambda x: _text(
        _sitk_bytes(x, ".nrrd", compressed=True), b"17 24 21", b"10000 10000 10000"
    ),
    "a.mha": lambda x: _text(
        _sitk_bytes(x, ".mha", compressed=False), b"17 24 21", b"1000 1000 1000"
    ),
    "b.mha": lambda x: _text(
        _sitk_bytes(x, ".mha", compressed=True), b"17 24 21", b"10000 10000 10000"
    ),
}


def _mgh_with(dims: bytes) -> bytes:
    found = bytearray(nib.MGHImage(smooth(), oblique()).to_bytes())
    found[4 : 4 + len(dims)] = dims
    return bytes(found)


@pytest.mark.parametrize("name", DECLARING)
@pytest.mark.parametrize("function", [read_header, read])
def test_a_declared_size_is_not_believed(
    tmp_path: Path, name: str, function: Callable[[Path], Any]
) -> None:
    """A small file that declares gigabytes is refused before memory is taken for it."""
    path = tmp_path / name
    path.write_bytes(DECLARING[name](tmp_path))
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    with pytest.raises(ReadError, match=r"it is truncated \(its header declares \d{10,} bytes"):
        function(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**21


@pytest.mark.parametrize("ending", [".nii.gz", ".mgz", ".img.gz", ".nrrd", ".mha"])
def test_decompression_stops_where_the_header_says(tmp_path: Path, ending: str) -> None:
    """A file that unpacks to far more than its header declares is refused, with both sizes."""
    path = write(tmp_path / f"scan{ending}")
    content, more = path.read_bytes(), bytes(2**26)
    if ending == ".nrrd":
        head, _, data = content.partition(b"\n\n")
        content = head + b"\n\n" + gzip.compress(gzip.decompress(data) + more, 1)
    elif ending == ".mha":
        content = _bomb_mha(content, more)
    else:
        content = gzip.compress(gzip.decompress(content) + more, 1)
    path.write_bytes(content)
    assert len(content) < 2**20
    tracemalloc.start()
    with pytest.raises(ReadError, match=r"its header declares \d+ bytes, the file holds \d+"):
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


def _bomb_mha(content: bytes, more: bytes) -> bytes:
    import zlib

    head, mark, data = content.partition(b"ElementDataFile = LOCAL\n")
    lines = [line for line in head.split(b"\n") if b"CompressedDataSize" not in line]
    return b"\n".join(lines) + mark + zlib.compress(zlib.decompress(data) + more, 1)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mgz", ".mgh"])
def test_a_few_bytes_after_the_voxels_are_allowed(tmp_path: Path, ending: str) -> None:
    """Writers fill the last block."""
    path = write(tmp_path / f"scan{ending}")
    content = path.read_bytes()
    plain = gzip.decompress(content) if ending.endswith("z") else content
    path.write_bytes(pack(path, plain + bytes(512)))
    np.testing.assert_array_equal(read(path).array, smooth())
    assert read_header(path).shape == SHAPE


def test_gzip_in_members_is_read(tmp_path: Path) -> None:
    """As bgzip and concatenation write it; padding with zeros is allowed."""
    content = nifti().to_bytes()
    path = tmp_path / "scan.nii.gz"
    members = [gzip.compress(content[i : i + 1000]) for i in range(0, len(content), 1000)]
    path.write_bytes(b"".join([gzip.compress(b""), *members]) + bytes(512))
    np.testing.assert_array_equal(read(path).array, smooth())
    assert read_header(path).shape == SHAPE


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_a_wrong_checksum_is_found_in_other_formats(tmp_path: Path, ending: str) -> None:
    """By reading the compressed voxels before SimpleITK does, which accepts them."""
    path = write(tmp_path / f"scan{ending}")
    content = bytearray(path.read_bytes())
    content[-5 if ending == ".nrrd" else -1] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(ReadError, match=f"{path}: cannot be read: its checksum is wrong"):
        read(path)


@pytest.mark.parametrize("ending", [".nii.gz", ".mha"])
def test_a_limit_is_kept(tmp_path: Path, ending: str) -> None:
    """The message holds both sizes; a volume of just that size is read."""
    path = write(tmp_path / f"scan{ending}", smooth((100, 200, 300)))
    size = 100 * 200 * 300 * 4
    with pytest.raises(VolumeError, match=r"declares 0.02 GB of voxels, --max-memory allows 0.01"):
        read(path, max_bytes=size // 2)
    assert read(path, max_bytes=size).array.shape == (100, 200, 300)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("a.nii", lambda content: b"", ReadError),
        ("a.nii", lambda content: content[:200], ReadError),
        ("a.nii.gz", lambda content: content[:60], ReadError),
        ("a.nii", lambda content: content[:-1], ReadError),
        ("a.nii", lambda content: content[:70] + b"\x80\x00" + content[72:], VolumeError),
        ("a.nii", lambda content: content[:70] + b"\x99\x99" + content[72:], ReadError),
        ("a.nii", lambda content: content[:40] + b"\x02\x00" + content[42:], VolumeError),
        ("a.nii", lambda content: content[:42] + b"\xfe\xff" + content[44:], ReadError),
        ("a.mgh", lambda content: b"\x00\x00\x00\x09" + content[4:], ReadError),
        ("a.mha", lambda content: content[:100], ReadError),
        ("a.nrrd", lambda content: content.replace(b"type: float", b"type: block"), ReadError),
        ("a.txt", lambda content: content, ReadError),
    ],
)
def test_errors_have_one_class_and_one_text(
    tmp_path: Path, name: str, change: Callable[[bytes], bytes], expected: type[PipelineError]
) -> None:
    """Whether the header alone is read, or the voxels too."""
    content = b"" if name.endswith("txt") else write(tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(change(content))
    texts = []
    for function in (read_header, read):
        with pytest.raises(expected) as raised:
            function(tmp_path / name)
        texts.append(str(raised.value))
    assert texts[0] == texts[1]
    assert texts[0].startswith(f"{tmp_path / name}: ")


def test_source_files_of_pairs(tmp_path: Path) -> None:
    """Both files, named by either, and the .mat of SPM; a missing .gz is found."""
    nib.save(nib.Nifti1Pair(smooth(), oblique()), tmp_path / "a.img")
    header, image, mat = (tmp_path / f"a{ending}" for ending in (".hdr", ".img", ".mat"))
    assert source_files(header) == source_files(image) == (header, image)
    image.with_suffix(".img.gz").write_bytes(gzip.compress(image.read_bytes()))
    image.unlink()
    assert source_files(header) == (header, tmp_path / "a.img.gz")
    np.testing.assert_array_equal(read(header).array, smooth())
    nib.save(nib.Spm99AnalyzeImage(smooth(), oblique()), tmp_path / "a.img")
    assert set(source_files(header)) == {header, image, mat}
    header.unlink()
    with pytest.raises(ReadError, match=r"a\.hdr is missing"):
        source_files(image)


@pytest.mark.parametrize("ending", [".nhdr", ".mhd"])
@pytest.mark.parametrize("compressed", [False, True])
def test_source_files_of_detached_headers(tmp_path: Path, ending: str, compressed: bool) -> None:
    """The header and the data file, also in another folder, where SimpleITK reads it."""
    path = write(tmp_path / f"a{ending}", compressed=compressed)
    (data,) = (file for file in tmp_path.iterdir() if file != path)
    assert source_files(path) == (path, data)
    folder = tmp_path / "voxels"
    folder.mkdir()
    data.rename(folder / data.name)
    path.write_bytes(path.read_bytes().replace(data.name.encode(), b"voxels/" + data.name.encode()))
    assert source_files(path) == (path, folder / data.name)
    np.testing.assert_array_equal(read(path).array, smooth())
    (folder / data.name).unlink()
    with pytest.raises(ReadError, match=f"its data file {folder / data.name} is missing"):
        source_files(path)


@pytest.mark.parametrize("by", ["LIST", "pattern"])
@pytest.mark.parametrize("ending", [".nhdr", ".mhd"])
def test_voxels_in_one_file_per_slice(tmp_path: Path, ending: str, by: str) -> None:
    """As a list of names, and as a numbered pattern."""
    path = write(tmp_path / f"a{ending}", compressed=False)
    (data,) = (file for file in tmp_path.iterdir() if file != path)
    content, size = data.read_bytes(), smooth()[..., 0].nbytes
    names = [f"slice{number:03d}.raw" for number in range(SHAPE[2])]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(content[number * size : (number + 1) * size])
    listed = "slice%03d.raw 0 20 1" if by == "pattern" else "LIST\n" + "\n".join(names)
    header = path.read_text().replace(data.name, listed)
    path.write_text(header)
    assert source_files(path) == (path, *(tmp_path / name for name in names))
    np.testing.assert_array_equal(read(path).array, smooth())
    (tmp_path / names[3]).unlink()
    with pytest.raises(ReadError, match=r"slice003\.raw is missing"):
        read(path)


@pytest.mark.parametrize("last", [0, 2**26])
def test_compressed_voxels_in_several_files(tmp_path: Path, last: int) -> None:
    """NRRD has a stream per file, which together hold what is declared; MetaImage has one."""
    path = write(tmp_path / "a.nhdr")
    (data,) = (file for file in tmp_path.iterdir() if file != path)
    content, size = gzip.decompress(data.read_bytes()), smooth()[..., 0].nbytes
    names = [f"{number}.gz" for number in range(SHAPE[2])]
    for number, name in enumerate(names):
        part = content[number * size : (number + 1) * size]
        (tmp_path / name).write_bytes(gzip.compress(part + bytes(last * (number == 2)), 1))
    path.write_text(path.read_text().replace(data.name, "LIST\n" + "\n".join(names)))
    if last:
        with pytest.raises(ReadError, match=r"its header declares 34272 bytes, the file holds \d+"):
            read(path)
        return
    np.testing.assert_array_equal(read(path).array, smooth())
    meta = write(tmp_path / "b.mhd")
    meta.write_text(meta.read_text().replace("a.zraw", "LIST\na.zraw\na.zraw"))
    with pytest.raises(ReadError, match="it is compressed in 2 files, expected one"):
        read(meta)


NAMES = [b"a b", b"line\nbreak", "Müller 日本".encode(), b"M\xfcller", b"'\"$%s\t"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ending", [*ENDINGS, *SITK_ENDINGS])
def test_any_name_is_read(tmp_path: Path, ending: str, name: bytes) -> None:
    """Spaces, line breaks, Unicode and bytes that are no UTF-8, in folders and files."""
    folder = tmp_path / os.fsdecode(name)
    folder.mkdir()
    path = folder / os.fsdecode(name + ending.encode())
    if ".hdr" in ending or ".img" in ending:
        for file in source_files(write(tmp_path / f"a{ending}")):
            file.rename(path.with_name(path.name.split(".")[0] + file.name[1:]))
    else:
        plain = write(tmp_path / f"a{ending}", compressed=False)
        for file in tmp_path.glob("a.*raw"):
            file.rename(folder / file.name)
        plain.rename(path)
    np.testing.assert_array_equal(read(path).array, smooth())
    assert read_header(str(path)).shape == SHAPE
    path.write_bytes(path.read_bytes()[:20])
    for function in (read, read_header):
        with pytest.raises(ReadError) as raised:
            function(path)
        text = str(raised.value)
        assert text.startswith(printable(path))
        assert text.encode()
        assert "\n" not in text


def test_names_are_shown_on_one_line() -> None:
    """Other names are unchanged."""
    assert printable(os.fsdecode(b"M\xfcller.nii")) == r"M\xfcller.nii"
    assert printable(Path("a\nb.nii")) == r"a\nb.nii"
    assert printable("Müller 日本.nii") == "Müller 日本.nii"
    assert printable("\ud800.nii") == r"\ud800.nii"


def test_a_mat_file_is_an_orientation_whatever_it_holds(tmp_path: Path) -> None:
    """Also the affine that is assumed without one."""
    image = nib.AnalyzeImage(smooth(), np.diag([-0.9, 1.3, 2.1, 1.0]))
    nib.save(image, tmp_path / "a.img")
    assert len(read(tmp_path / "a.hdr").warnings) == 1
    affine = read(tmp_path / "a.hdr").affine
    to_111 = np.eye(4)
    to_111[:3, 3] = -1  # MATLAB counts voxels from 1
    scipy.io.savemat(tmp_path / "a.mat", {"mat": affine @ to_111})
    np.testing.assert_allclose(read(tmp_path / "a.hdr").affine, affine, atol=1e-6)
    assert read(tmp_path / "a.hdr").warnings == ()
    assert read(tmp_path / "a.hdr").header == b""


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    """From a manifest, for example."""
    for name in ("\ud800.nii", "a\0b.nii", "a" * 300 + ".nii"):
        for function in (read, read_header):
            with pytest.raises(ReadError) as raised:
                function(tmp_path / name)
            assert str(raised.value).encode()


def test_a_large_mat_file_is_refused(tmp_path: Path) -> None:
    """It could hold any amount of data, compressed."""
    nib.save(nib.Spm99AnalyzeImage(smooth(), oblique()), tmp_path / "a.img")
    scipy.io.savemat(tmp_path / "a.mat", {"mat": np.random.default_rng(0).normal(size=(4, 4, 999))})
    with pytest.raises(ReadError, match=r"a\.mat has over 65536 bytes"):
        read(tmp_path / "a.img")


def test_headers_of_images_in_memory() -> None:
    """The same facts, without a file."""
    for image in (nifti(), sitk.GetImageFromArray(np.ascontiguousarray(smooth().transpose()))):
        header = read_header(image)
        assert (header.shape, header.volumes, header.file_bytes) == (SHAPE, 1, 0)
        assert header.declared_bytes == smooth().nbytes
        np.testing.assert_array_equal(header.affine, read(image).affine)


def test_real_headers(data: Path) -> None:
    """Those of all real scans, as nibabel reads them."""
    paths = sorted((data / "bids_t1w").rglob("*T1w.nii.gz"))
    paths += sorted((data / "real").glob("*.nii.gz"))
    assert len(paths) > 20
    for path in paths:
        header, image = read_header(path), nib.load(path)
        assert (*header.shape, *([header.volumes] * (header.volumes > 1))) == image.shape
        np.testing.assert_array_equal(header.affine, image.affine)
        assert header.nifti == image.header.binaryblock
        assert header.declared_bytes == image.dataobj.dtype.itemsize * np.prod(image.shape)


def test_pairs_are_saved_and_read_in_a_temporary_folder(tmp_path: Path) -> None:
    """A relative path works like an absolute one."""
    save(tmp_path / "a.nii.gz")
    here = Path.cwd()
    try:
        os.chdir(tmp_path)
        assert read_header("a.nii.gz").shape == SHAPE
        assert source_files(Path("a.nii.gz")) == (Path("a.nii.gz"),)
    finally:
        os.chdir(here)
