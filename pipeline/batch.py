"""Many cases, one after the other: what is to be done, what was done, what failed and why."""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from glob import glob, has_magic
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel as nib
import torch

from pipeline.engine import Model, Prediction, predict_case
from pipeline.errors import ConfigError, PipelineError, WriteError, mendable
from pipeline.read import suffix
from pipeline.report import read_csv, sha256, volumes_mm3, write_csv, write_json
from pipeline.spec import Spec
from pipeline.types import Case, PathOrStr
from pipeline.write import DESCRIPTION, as_nibabel, write_labels

CASES, VOLUMES, RUN = "cases.csv", "volumes.csv", "run.json"
STEPS = ("read", "preprocess", "network", "invert", "write")
PACKAGES = ("volseg", "monai", "torch", "nibabel", "SimpleITK", "pytorch-ignite", "numpy")
CHANNEL_NUMBER = re.compile(r"_(\d{4})$")
Progress = Callable[[Case, dict[str, Any]], None]


def find_cases(inputs: Sequence[PathOrStr], spec: Spec) -> list[Case]:
    """The cases that files, folders and globs hold, in order.

    A folder is searched with all below it; label maps that volseg wrote there are passed over. A model of several channels
    takes one file a channel, told apart by an ending before the suffix: the channel's name (`sub-01_FLAIR.nii.gz`) or its
    number (`sub-01_0001.nii.gz`).

    Returns:
        dicts of `case` (the output's name, relative, without suffix) and `image` (a path, or one a channel).

    Raises:
        ConfigError: an input that is not there, nothing to do, a channel without a file, or two inputs with one output.
    """
    files = dict.fromkeys(pair for item in inputs for pair in _files(item))
    cases = [{"case": name, "image": str(path)} for name, path in files]
    if len(spec.channels) > 1:
        cases = _grouped(cases, spec.channels)
    _refuse_collisions(cases)
    return cases


def segment(
    model: Model, cases: Sequence[Case], output_dir: PathOrStr, *, overwrite: bool = False, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Segments each case; a case that fails is recorded and the next one goes on.

    Leaves `<case>_seg.nii.gz` a case, `volumes.csv` (mm³), `cases.csv` (one row a case) and `run.json`; the tables are
    rewritten after each case, so a killed run loses nothing, and a run started again goes on where it stopped.

    Args:
        model: an opened bundle.
        cases: dicts of `case` and `image`.
        output_dir: where results go; made if it is not there.
        overwrite: whether cases that are done already are done again.
        progress: called with each case and its row.

    Returns:
        the rows of `cases.csv`, in the order of `cases`.

    Raises:
        ConfigError: the folder holds results of another model.
    """
    out = Path(output_dir)
    identity = _identity(model)
    anew = _is_of_another_model(out, identity, overwrite)
    done = {} if anew else {row["case"]: row for row in read_csv(out / CASES)}
    volumes: dict[str, dict[str, Any]] = {} if anew else {row["case"]: dict(row) for row in read_csv(out / VOLUMES)}
    rows: list[dict[str, Any]] = []
    write_json(out / RUN, identity | {"command": sys.argv, "versions": {name: version(name) for name in PACKAGES}})
    for case in cases:
        name = case.get("case") or _name_of(case)
        row, sizes = _one(model, {**case, "case": name}, out, done.get(name), overwrite=overwrite)
        rows.append(row)
        done[name] = row
        if sizes is not None:
            volumes[name] = {"case": name, **sizes}
        elif row["status"] == "failed":
            volumes.pop(name, None)
        write_csv(out / CASES, done.values())
        write_csv(out / VOLUMES, volumes.values())
        if progress is not None:
            progress(case, row)
    return rows


def run_bundle(model: Model, cases: Sequence[Case], output_dir: PathOrStr) -> None:
    """`segment` as the last step of `python -m monai.bundle run`.

    Raises:
        PipelineError: after all cases, where some failed; it names them.
    """
    rows = segment(model, cases, output_dir, overwrite=True)
    failed = [f"{row['case']}: {row['message']}" for row in rows if row["status"] == "failed"]
    if failed:
        raise PipelineError(f"{len(failed)} of {len(rows)} cases failed, the others are written:\n" + "\n".join(failed))


def output_path(output_dir: Path, case: str) -> Path:
    """Where a case's label map goes."""
    return output_dir / f"{case}_seg.nii.gz"


def _files(item: PathOrStr) -> Iterator[tuple[str, Path]]:
    """Each image file of one input, with the name of its output."""
    path = Path(item)
    if path.is_file():
        yield _stem(Path(path.name)), _header_of(path)
        return
    if path.is_dir():
        root, found = path, list(path.rglob("*"))
    elif has_magic(str(item)):
        parts = path.parts
        root = Path(*parts[: next(i for i, part in enumerate(parts) if has_magic(part))])
        found = [Path(match) for match in glob(str(item), recursive=True)]
    else:
        raise ConfigError(f"{path}: no such file or folder")
    images = sorted(p for p in found if p.is_file() and _is_image(p))
    if not images:
        raise ConfigError(f"{path}: no image files there; expected names such as scan.nii.gz")
    yield from ((_stem(p.relative_to(root)), p) for p in images)


def _is_image(path: Path) -> bool:
    """Whether a file found in a folder is an input: the .img of a pair is read with its .hdr, and our results are none."""
    kind = suffix(path)
    if kind is None or path.name.startswith(".") or kind in (".img", ".img.gz"):
        return False
    return not (path.name.endswith("_seg.nii.gz") and _is_ours(path))


def _header_of(path: Path) -> Path:
    """The .hdr of a pair that is named by its .img, so that both are one input."""
    kind = suffix(path) or ""
    header = path.with_name(path.name[: len(path.name) - len(kind)] + kind.replace("img", "hdr"))
    return header if header.is_file() else path


def _is_ours(path: Path) -> bool:
    """Whether volseg wrote a file."""
    try:
        return bool(nib.load(path).header.get("descrip") == DESCRIPTION)
    except Exception:  # a damaged file, of which nibabel says so in many ways
        return False


def _stem(path: Path) -> str:
    kind = suffix(path) or path.suffix
    return path.as_posix()[: len(path.as_posix()) - len(kind)]


def _name_of(case: Case) -> str:
    image = case["image"]
    return _stem(Path(Path(image if isinstance(image, str | Path) else image[0]).name))


def _grouped(cases: Sequence[Case], channels: Sequence[str]) -> list[Case]:
    """One case for the files that differ in their channel only."""
    groups: dict[str, dict[str, str]] = {}
    for case in cases:
        name, channel = _channel_of(case["case"], channels)
        files = groups.setdefault(name, {})
        if channel in files:
            raise ConfigError(f"{name}: two files for channel {channel}, {files[channel]} and {case['image']}; keep one")
        files[channel] = case["image"]
    for name, files in groups.items():
        missing = [channel for channel in channels if channel not in files]
        if missing:
            raise ConfigError(f"{name}: no file for channel {', '.join(missing)}; found {', '.join(files.values())}")
    return [{"case": name, "image": [files[channel] for channel in channels]} for name, files in groups.items()]


def _channel_of(name: str, channels: Sequence[str]) -> tuple[str, str]:
    for channel in channels:
        if name.endswith(f"_{channel}"):
            return name[: -len(channel) - 1], channel
    number = CHANNEL_NUMBER.search(name)
    if number and int(number[1]) < len(channels):
        return name[: number.start()], channels[int(number[1])]
    raise ConfigError(
        f"{name}: which channel is it? Expected a name that ends in one of _{', _'.join(channels)}, or _0000, _0001, …"
    )


def _refuse_collisions(cases: Sequence[Case]) -> None:
    twice = {name: count for name, count in Counter(case["case"] for case in cases).items() if count > 1}
    if twice:
        name = next(iter(twice))
        clashing = " and ".join(str(case["image"]) for case in cases if case["case"] == name)
        raise ConfigError(
            f"{len(twice)} outputs would be written more than once, {name}_seg.nii.gz for one, from {clashing}: "
            "rename the files, or give the folder that holds them all"
        )


def _identity(model: Model) -> dict[str, str]:
    """What must be equal for results to belong together."""
    root = Path(model.root)
    return {
        "bundle": root.resolve().name,
        "weights_sha256": sha256(root / "models" / "model.pt"),
        "spec_sha256": sha256(root / "configs" / "spec.yaml"),
        "overlap": str(getattr(model.evaluator.inferer, "overlap", "")),
        "volume": str(getattr(model.preprocessing.transforms[0], "volume", None)),
    }


def _is_of_another_model(out: Path, identity: dict[str, str], overwrite: bool) -> bool:
    """Whether a folder's tables tell of other results than ours, which must not be mixed with them."""
    if not (out / RUN).is_file():
        return False
    before = json.loads((out / RUN).read_text(encoding="utf-8"))
    other = [key for key, value in identity.items() if before.get(key) != value]
    if other and not overwrite:
        raise ConfigError(
            f"{out}: holds results of another model or setting ({', '.join(f'{key} {before.get(key)}' for key in other)}); "
            "choose another folder, or --overwrite"
        )
    return bool(other)


def _one(
    model: Model, case: Case, out: Path, before: dict[str, Any] | None, *, overwrite: bool
) -> tuple[dict[str, Any], dict[str, float] | None]:
    """The row of one case and its volumes; (row, None) where there is nothing new to measure."""
    path = output_path(out, case["case"])
    if not overwrite and before is not None and before["status"] in ("done", "skipped") and path.is_file():
        return {**before, "status": "skipped"}, None
    _reset_peak_memory()
    try:
        if not overwrite and path.is_file() and not _is_ours(path):
            raise WriteError(f"{path}: is there already and was not written by volseg; move it away, or --overwrite")
        prediction = predict_case(model, case["image"])
        started = time.perf_counter()
        write_labels(path, as_nibabel(prediction.labels, prediction.affine, prediction.header))
        prediction.seconds["write"] = time.perf_counter() - started
    except Exception as error:
        return _row(case, "failed", message=_reason(error)), None
    sizes = volumes_mm3(prediction.labels, prediction.affine, model.spec.labels)
    return _row(case, "done", prediction=prediction), sizes


def _reason(error: BaseException) -> str:
    """Why a case failed; whatever it was, the other cases go on."""
    known = mendable(error)
    if known is not None:
        return str(known)
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return f"out of memory ({error}); free some, or use a machine with more"
    return f"unexpected {type(error).__name__}: {error} (a bug of volseg: please report it)"


def _row(case: Case, status: str, *, message: str = "", prediction: Prediction | None = None) -> dict[str, Any]:
    image = case["image"]
    seconds = prediction.seconds if prediction else {}
    return {
        "case": case["case"],
        "status": status,
        "input": str(image) if isinstance(image, str | Path) else ";".join(map(str, image)),
        "message": message,
        "warnings": "; ".join(prediction.warnings) if prediction else "",
        **{f"{step}_s": f"{seconds[step]:.3f}" if step in seconds else "" for step in STEPS},
        "peak_memory_mb": f"{_peak_memory_mb():.0f}",
    }


def _reset_peak_memory() -> None:
    """Starts the peak anew, where the kernel lets it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_memory_mb() -> float:
    """The process's largest resident memory since `_reset_peak_memory`, MB (since its start where that is not possible)."""
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
