"""Feed damaged files to the readers: nothing but a PipelineError may come out, within bounds.

    scripts/fuzz_readers.py --count 20000 --seed 0

Small valid files of all formats are mutated: random bytes, fields of their headers, truncations,
appended bytes and files. Each result goes through `read_header`, `read` and the checks of a volume,
in a child process. A violation is a crash, any other exception, a run of over 10 s, a header that
differs between the two ways, or memory beyond 64 MB + 2 × min(declared, unpacked) bytes, where
unpacked values count with the 4 bytes that they take once scaled. Violations are printed, and
their files are kept.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import os
import random
import resource
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np

SHAPE = (9, 7, 8)
# of noise that barely compresses: its file has room for hundreds of MB, if its header declares them
LARGE_SHAPE = (60, 50, 70)
FREE_BYTES = 64 * 2**20
MAX_SECONDS = 10.0
ADDRESS_SPACE = 8 * 2**30  # of a child: a reader that takes more fails with a MemoryError
FLOAT_BYTES = 4
# numbers at which arithmetic goes wrong
NUMBERS = (0, 1, 2, 3, 4, 5, 7, 8, -1, -2, 127, 128, 255, 256, 348, 540, 1000, 2**15 - 1, -(2**15))
LARGE = (2**16, 2**24, 2**31 - 1, -(2**31), 2**32 - 1, 2**40, 2**62, 2**63 - 1)
FLOATS = (0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf"), float("-inf"), 352.5, 0.001, 1000.0)
# fmt: off
TEXTS = (b"", b"0", b"-1", b"1", b"3", b"4", b"1e9", b"nan", b"99999999999999999999", b"4294967296",
         b"%s%s%s", b"%d", b"x%03d 1 9 1", b"LIST", b"LOCAL", b"True", b"False", b"gzip", b"raw",
         b"ascii", b"hex", b"bzip2", b"none none none", b"(nan,0,0) (0,1,0) (0,0,1)", b"/dev/zero",
         b"../x", b"\xfc\xff", b"1 " * 40, b"vector domain domain domain", b"MET_FLOAT",
         b"MET_DOUBLE_ARRAY", b"double", b"block", b"short", b"65535 65535 65535", b"9 7 8 1000000",
         b"60 50 30000", b"60 50 70 300", b"6000 5000 7",
         b"left-posterior-superior", b"scanner-xyz", b'"um" "um" "um"', b"um", b"9 7", b"0 7 8")
# offset and type of the fields that decide on sizes and places, by the header's kind
NIFTI1_FIELDS = [(0, "i"), *((40 + 2 * i, "h") for i in range(8)), (70, "h"), (72, "h"),
                 *((76 + 4 * i, "f") for i in range(8)), (108, "f"), (112, "f"), (116, "f"),
                 (123, "b"), (140, "i"), (252, "h"), (254, "h"), (280, "f"), (284, "f"), (344, "i")]
NIFTI2_FIELDS = [(0, "i"), (4, "i"), (12, "h"), (14, "h"), *((16 + 8 * i, "q") for i in range(8)),
                 *((104 + 8 * i, "d") for i in range(8)), (168, "q"), (176, "d"), (184, "d"),
                 (344, "i"), (348, "i"), (400, "d"), (500, "i")]
# fmt: on
MGH_FIELDS = [*((4 * i, "i") for i in range(7)), (28, "h"), *((30 + 4 * i, "f") for i in range(15))]


@dataclass(frozen=True)
class Sample:
    """A valid file, or the files of a pair, not compressed.

    Attributes:
        name: of the file to read.
        files: name → content.
        fields: of the binary header, in the first of the files.
        order: byte order of these fields.
    """

    name: str
    files: Mapping[str, bytes]
    fields: tuple[tuple[int, str], ...] = ()
    order: str = "<"


def samples() -> list[Sample]:
    """Return valid files of all formats."""
    values = np.random.default_rng(0).normal(100, 20, SHAPE)
    affine = np.diag([0.9, 1.3, 2.1, 1.0])
    found = []
    for dtype in ("u1", "i2", "f4", "f8"):
        array = values.astype(dtype)
        for kind, fields in ((nib.Nifti1Image, NIFTI1_FIELDS), (nib.Nifti2Image, NIFTI2_FIELDS)):
            found.append(Sample("a.nii", {"a.nii": kind(array, affine).to_bytes()}, tuple(fields)))
    for array in (values.astype("f4"), values.astype("i2")):
        mgh = nib.MGHImage(array, affine).to_bytes()
        found.append(Sample("a.mgh", {"a.mgh": mgh}, tuple(MGH_FIELDS), ">"))
        four = nib.Nifti1Image(np.stack([array] * 3, axis=-1), affine).to_bytes()
        found.append(Sample("a.nii", {"a.nii": four}, tuple(NIFTI1_FIELDS)))
    for kind, fields in (
        (nib.Nifti1Pair, NIFTI1_FIELDS),
        (nib.Nifti2Pair, NIFTI2_FIELDS),
        (nib.Spm2AnalyzeImage, NIFTI1_FIELDS),
    ):
        found.append(Sample("a.hdr", _pair(kind(values.astype("i2"), affine)), tuple(fields)))
    noise = np.random.default_rng(0).integers(0, 2**15, LARGE_SHAPE).astype("i2")
    for _ in range(4):  # as likely as the small ones together
        image, mgh = nib.Nifti1Image(noise, affine), nib.MGHImage(noise, affine)
        found.append(Sample("a.nii", {"a.nii": image.to_bytes()}, tuple(NIFTI1_FIELDS)))
        found.append(Sample("a.mgh", {"a.mgh": mgh.to_bytes()}, tuple(MGH_FIELDS), ">"))
    return found + list(_text_samples(values)) + list(_text_samples(noise, (".mha", ".nrrd")))


def _pair(image: Any) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        nib.save(image, Path(folder) / "a.img")
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _text_samples(
    values: Any, suffixes: tuple[str, ...] = (".nrrd", ".nhdr", ".mha", ".mhd")
) -> Iterator[Sample]:
    """Yield NRRD and MetaImage files, attached and detached, raw and compressed."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(values.astype("i2").transpose())
    image.SetSpacing((0.9, 1.3, 2.1))
    floats = sitk.Cast(image, sitk.sitkFloat32)
    series = sitk.JoinSeries([image, image])
    vector = sitk.Compose([image, image, image])
    for suffix in suffixes:
        for voxels in (image, floats, series, vector):
            for compressed in (False, True):
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / f"a{suffix}"
                    sitk.WriteImage(voxels, str(path), useCompression=compressed)
                    files = {x.name: x.read_bytes() for x in Path(folder).iterdir()}
                ordered = {path.name: files.pop(path.name), **files}
                yield Sample(path.name, ordered)


class Mutation:
    """Random changes of a sample's files, drawn from one generator."""

    def __init__(self, seed: int, pool: list[Sample]) -> None:
        self.random, self.pool = random.Random(seed), pool

    def case(self) -> tuple[str, dict[str, bytes], str]:
        """Return the name of the file to read, all files, and what was done."""
        sample = self.random.choice(self.pool)
        files, done = dict(sample.files), []
        for _ in range(self.random.choice((1, 1, 1, 2, 3))):
            change = self.random.choice(
                (self.flip, self.field, self.field, self.field, self.truncate, self.append)
            )
            target = self.random.choice(list(files)) if self.random.random() < 0.3 else ""
            target = target or next(iter(files))
            files[target] = change(files[target], sample)
            done.append(f"{change.__name__} {target}")
        name, files = self.packed(sample.name, files)
        return name, files, ", ".join(done)

    def flip(self, content: bytes, sample: Sample) -> bytes:
        """Change up to 8 bytes, most of them near the beginning."""
        changed = bytearray(content)
        for _ in range(self.random.randint(1, 8)):
            if changed:
                end = min(len(changed), self.random.choice((64, 400, 600, len(changed))))
                changed[self.random.randrange(end)] = self.random.randrange(256)
        return bytes(changed)

    def field(self, content: bytes, sample: Sample) -> bytes:
        """Set a field of the header to a number or a text at which arithmetic goes wrong."""
        if not sample.fields:
            return self.text_field(content)
        offset, kind = self.random.choice(sample.fields)
        if offset + struct.calcsize(kind) > len(content):
            return content
        value: Any = self.random.choice(NUMBERS + LARGE)
        if kind in "fd":
            value = self.random.choice((*FLOATS, *map(float, NUMBERS + LARGE)))
            stored = struct.pack(f"{sample.order}{kind}", value)
        else:
            size = struct.calcsize(kind)
            order: Literal["little", "big"] = "little" if sample.order == "<" else "big"
            stored = (value % 2 ** (8 * size)).to_bytes(size, order)
        return content[:offset] + stored + content[offset + len(stored) :]

    def text_field(self, content: bytes) -> bytes:
        """Set, remove or repeat a line of a text header."""
        lines = content.split(b"\n")
        last = next((i for i, x in enumerate(lines) if not x or b"DataFile" in x), len(lines) - 1)
        number = self.random.randint(0, min(last, len(lines) - 1))
        line = lines[number]
        mark = b" = " if b" = " in line else b": "
        action = self.random.randrange(6)
        if action == 0:
            del lines[number]
        elif action == 1:
            lines.insert(number, line)
        elif action == 2:
            extra = self.random.choice(
                (b"byte skip: ", b"line skip: ", b"HeaderSize = ", b"ElementNumberOfChannels = ",
                 b"data file: ", b"space units: ", b"CompressedDataSize = ", b"kinds: ")
            )  # fmt: skip
            lines.insert(number, extra + self.random.choice(TEXTS))
        else:
            lines[number] = line.partition(mark)[0] + mark + self.random.choice(TEXTS)
        return b"\n".join(lines)

    def truncate(self, content: bytes, sample: Sample) -> bytes:
        """Cut the end off."""
        return content[: self.random.randrange(len(content) + 1)]

    def append(self, content: bytes, sample: Sample) -> bytes:
        """Add bytes, another file, or the same file once more."""
        other = self.random.choice(list(self.random.choice(self.pool).files.values()))
        zeros = bytes(self.random.choice((1, 100, 70_000)))
        return content + self.random.choice((content, other, zeros))

    def packed(self, name: str, files: dict[str, bytes]) -> tuple[str, dict[str, bytes]]:
        """Compress some of the files: whole, in members, with damage, or with much behind them."""
        if name.endswith((".nrrd", ".nhdr", ".mha", ".mhd")) or self.random.random() < 0.4:
            return name, files
        packed = {}
        for file, content in files.items():
            suffix = self.random.choice((".gz", ".gz", ""))
            if file == "a.mgh":
                packed["a.mgz"] = self.gzipped(content)
            elif len(files) > 1:
                packed[file + ".gz"] = self.gzipped(content)
            else:
                packed[file + suffix] = self.gzipped(content)
        return next(iter(packed)) if len(files) == 1 else name + ".gz", packed

    def gzipped(self, content: bytes) -> bytes:
        """Return a gzip stream, whole or damaged."""
        kind = self.random.randrange(10)
        if kind == 0:  # in members
            cut = self.random.randrange(len(content) + 1)
            return gzip.compress(content[:cut], 1) + gzip.compress(content[cut:], 1)
        if kind == 1:  # far more than the header declares
            return gzip.compress(content + bytes(2 ** self.random.randint(10, 27)), 1)
        stream = gzip.compress(content, 1)
        if kind == 2:
            return stream[: self.random.randrange(len(stream))]
        if kind == 3:
            return stream + self.random.choice((bytes(9), b"garbage", stream))
        if kind == 4:
            damaged = bytearray(stream)
            damaged[self.random.randrange(len(damaged))] ^= 1 << self.random.randrange(8)
            return bytes(damaged)
        return stream


def unpacked_bytes(files: Mapping[str, bytes]) -> int:
    """Return the bytes of all files, decompressed as far as they can be."""
    total = 0
    for content in files.values():
        size, rest = 0, content
        while rest.startswith(b"\x1f\x8b"):
            inflater = zlib.decompressobj(31)
            try:
                size += len(inflater.decompress(rest))
            except zlib.error:
                break
            rest = inflater.unused_data
        total += max(size, len(content))
    return total


# The child: reads names from stdin, answers with one line of JSON each


def child() -> None:
    """Read each file that a line of stdin names, and print what happened as JSON."""
    from pipeline.errors import PipelineError
    from pipeline.io import read, read_header
    from pipeline.transforms import CheckVolumed, LoadVolumed

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    load, check = LoadVolumed("image", volume=0), CheckVolumed("image")

    def checked(path: Path) -> int:
        return int(check(load({"image": str(path)}))["image"].numel())

    def declared(path: Path) -> dict[str, Any]:
        header = read_header(path)
        return {"shape": header.shape, "affine": header.affine.tobytes().hex(),
                "warnings": header.warnings, "bytes": header.declared_bytes,
                "voxels": int(np.prod(header.shape, dtype=object)) * header.volumes}  # fmt: skip

    def content(path: Path) -> dict[str, Any]:
        image = read(path, 0)
        return {"shape": image.array.shape, "affine": image.affine.tobytes().hex(),
                "warnings": image.warnings}  # fmt: skip

    warm = Path(sys.argv[2])
    for path in sorted(warm.iterdir()):
        for function in (declared, content, checked):
            outcome(function, path, PipelineError)
    limit = ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print("ready", flush=True)
    for line in sys.stdin:
        path = Path(line.rstrip("\n"))
        answer: dict[str, Any] = {"header": outcome(declared, path, PipelineError)}
        before = reset_peak()
        answer["read"] = outcome(content, path, PipelineError)
        answer["growth"] = peak() - before
        if "value" in answer["read"]:
            answer["checked"] = outcome(checked, path, PipelineError)
        print(json.dumps(answer, default=list), flush=True)


def outcome(
    function: Callable[[Path], Any], path: Path, expected: type[Exception]
) -> dict[str, Any]:
    """Return what a function returned, or the error that it raised."""
    try:
        return {"value": function(path)}
    except expected as error:
        return {"error": type(error).__name__, "text": str(error).encode().decode()}
    except BaseException as error:
        return {"bug": type(error).__name__, "text": repr(error)[:300]}


def reset_peak() -> int:
    """Start to measure the peak anew, and return the memory in use, bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Return the highest memory in use since `reset_peak`, bytes."""
    return _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(name)


class Reader:
    """A child process that reads files, started again when it dies."""

    def __init__(self, warm: Path) -> None:
        self.warm = warm
        self.start()

    def start(self) -> None:
        """Start the child and wait until it has imported everything."""
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--child", str(self.warm)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if self.answer(120) != "ready\n":
            raise RuntimeError("the child does not start")

    def answer(self, seconds: float) -> str:
        """Return the child's next line; empty if it died or took too long."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline() if ready else ""

    def read(self, path: Path) -> dict[str, Any]:
        """Return what happened to a file."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        line = self.answer(3 * MAX_SECONDS)
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        hung = self.process.poll() is None and not self.process.stdout.closed  # type: ignore[union-attr]
        if hung:
            try:
                self.process.wait(1)
                hung = False
            except subprocess.TimeoutExpired:
                self.process.kill()
        code = self.process.wait()
        self.close()
        self.start()
        return {"dead": "hangs" if hung else f"died with {code}"}

    def close(self) -> None:
        """End the child."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def violations(answer: dict[str, Any], files: Mapping[str, bytes]) -> Iterator[str]:
    """Yield what is wrong with an answer."""
    if "dead" in answer:
        yield answer["dead"]
        return
    for step in ("header", "read", "checked"):
        if "bug" in answer.get(step, {}):
            yield f"{step} raises {answer[step]['text']}"
    header, read = answer["header"], answer["read"]
    yield from _differences(header, read)
    value = header.get("value", {"bytes": 0, "voxels": 0})
    unpacked = unpacked_bytes(files)
    counted = min(max(value["bytes"], FLOAT_BYTES * value["voxels"]), FLOAT_BYTES * unpacked)
    if answer["growth"] > FREE_BYTES + 2 * counted:
        yield f"takes {answer['growth']} bytes for {value['bytes']} declared, {unpacked} unpacked"


def _differences(header: dict[str, Any], read: dict[str, Any]) -> Iterator[str]:
    """Yield where reading the header and reading the voxels disagree."""
    if "error" in header and "value" in read:
        yield f"only the header is refused: {header['text']}"
    if header.get("error") and read.get("error") and header["error"] != read["error"]:
        yield f"two errors: {header['text']} and {read['text']}"
    if "value" in header and "value" in read:
        for key in ("shape", "affine", "warnings"):
            if header["value"][key] != read["value"][key]:
                yield f"{key}: {header['value'][key]} in the header, {read['value'][key]} read"


def fuzz(count: int, seed: int, folder: Path) -> list[str]:
    """Try `count` files; return the violations, whose files are kept in `folder`."""
    pool = samples()
    mutation = Mutation(seed, pool)
    found: list[str] = []
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        warm, work = Path(scratch) / "warm", Path(scratch) / "work"
        for number, sample in enumerate(pool):
            target = warm / str(number)
            target.mkdir(parents=True)
            for name, content in sample.files.items():
                (target / name).write_bytes(content)
        for number, sample in enumerate(pool):
            (warm / f"{number}{Path(sample.name).suffix}").symlink_to(
                warm / str(number) / sample.name
            )
        reader = Reader(warm)
        for number in range(count):
            name, files, done = mutation.case()
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            for file, content in files.items():
                (work / file).write_bytes(content)
            answer = reader.read(work / name)
            outcomes[next(iter(answer.get("read", {"dead": 0})))] += 1
            for violation in violations(answer, files):
                kept = folder / f"{seed}_{number}"
                shutil.copytree(work, kept, dirs_exist_ok=True)
                found.append(f"{kept / name} ({done}): {violation}")
                print(found[-1], flush=True)
        reader.close()
    print(f"{count} files: {outcomes['value']} read, {outcomes['error']} refused, "
          f"{len(found)} violations")  # fmt: skip
    return found


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=1000, help="how many files are tried")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mutations")
    parser.add_argument("--folder", type=Path, help="where files with violations are kept")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.gettempdir()) / "fuzz_readers"
    return 1 if fuzz(options.count, options.seed, folder) else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child()
        os._exit(0)
    sys.exit(main())
