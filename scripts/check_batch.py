"""Segments real crops and broken files in four ways, and compares every result.

    python scripts/check_batch.py $VOLSEG_DATA/hippocampus/imagesTr -o runs/check_batch

Good crops and one file of each kind of damage go through one process, two processes, three shards
at the same time, and Dask with two local workers. Each way must give the same label maps byte for
byte, the same rows, and exit status 1. Prints one line per way.
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import nibabel as nib
import numpy as np

from pipeline.io import read_csv, sha256

WAYS: dict[str, Sequence[Sequence[str]]] = {
    "one process": [["--jobs", "1"]],
    "two processes": [["--jobs", "2"]],
    "three shards": [["--jobs", "1", "--shard", f"{part}/3"] for part in (1, 2, 3)],
    "dask local": [["--dask", "local"]],
}


def break_files(good: Path, folder: Path) -> None:
    """Write one file of each kind of damage, made from a good crop."""
    content = good.read_bytes()
    image = nib.load(good)
    array = np.asarray(image.dataobj, dtype=np.float32)

    def save(name: str, values: np.ndarray, **header: object) -> None:
        made = nib.Nifti1Image(values, image.affine)
        for key, value in header.items():
            made.header[key] = value
        made.to_filename(folder / f"{name}.nii.gz")

    (folder / "bad_cut.nii.gz").write_bytes(content[: len(content) // 2])
    (folder / "bad_crc.nii.gz").write_bytes(content[:-8] + bytes(4) + content[-4:])
    (folder / "bad_empty.nii.gz").write_bytes(b"")
    (folder / "bad_text.nii.gz").write_bytes(b"no image at all")
    (folder / "bad_header.nii").write_bytes(gzip.decompress(content)[:200])
    (folder / "bad_link.nii.gz").symlink_to("nowhere.nii.gz")
    save("bad_nan", np.full_like(array, np.nan))
    save("bad_constant", np.full_like(array, 7))
    save("bad_labels", (array > array.mean()).astype(np.uint8))
    save("bad_4d", np.stack([array, array], axis=-1))
    sheared = image.affine.copy()
    sheared[0, 1] = 1.0
    nib.Nifti1Image(array, sheared).to_filename(folder / "bad_sheared.nii.gz")
    nib.Nifti1Image(array.astype(np.complex64), image.affine).to_filename(
        folder / "bad_complex.nii.gz"
    )


def run_way(calls: Sequence[Sequence[str]], inputs: Path, out: Path, bundle: str) -> list[int]:
    """Run the commands of one way at the same time, and return their exit statuses."""
    command = [sys.executable, "-m", "pipeline.cli", "segment", str(inputs), "-o", str(out)]
    command += ["--bundle", bundle, "--quiet"]
    running = [subprocess.Popen([*command, *call]) for call in calls]
    return [process.wait() for process in running]


def outcome(out: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return the hash of each label map, and what each row of cases.csv states."""
    maps = {path.name: sha256(path) for path in sorted(out.glob("*_seg.nii.gz"))}
    rows = {row["case"]: f"{row['status']} {row['message']}" for row in read_csv(out / "cases.csv")}
    return maps, rows


@click.command()
@click.argument("crops", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Work folder.")
@click.option("--count", default=60, show_default=True, help="Number of good crops.")
@click.option("--bundle", default="hippocampus_mr_3d", show_default=True, help="Bundle.")
def main(crops: Path, output: Path, count: int, bundle: str) -> None:
    """Segment crops and broken files in four ways, and compare every result."""
    shutil.rmtree(output, ignore_errors=True)
    inputs = output / "in"
    inputs.mkdir(parents=True)
    good = sorted(crops.glob("*.nii.gz"))[:count]
    for path in good:
        shutil.copy(path, inputs)
    break_files(good[0], inputs)
    broken = len(list(inputs.iterdir())) - len(good)
    report: Callable[[str], None] = click.echo
    first = None
    wrong = 0
    for name, calls in WAYS.items():
        out = output / name.replace(" ", "_")
        statuses = run_way(calls, inputs, out, bundle)
        maps, rows = outcome(out)
        failed = sum(row.startswith("failed") for row in rows.values())
        left = list(out.rglob("*.tmp"))
        first = first or (maps, rows)
        same = (maps, rows) == first
        right = same and len(maps) == len(good) and failed == broken and not left
        right = right and max(statuses) == 1
        wrong += not right
        report(
            f"{name}: {len(maps)} of {len(good)} maps, {failed} of {broken} failed rows, equal to "
            f"the first way: {same}, exit {statuses}, {'right' if right else 'WRONG'}"
        )
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
