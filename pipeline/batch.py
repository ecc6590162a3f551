"""Many cases, one after the other: what is to be done, what was done, what failed and why."""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from glob import glob, has_magic
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel as nib
import torch

from pipeline.ahead import ahead, behind
from pipeline.engine import Model, Prediction, Prepared, compute, prepare
from pipeline.errors import ConfigError, PipelineError, WriteError
from pipeline.memory import peak_bytes, predict_within, reset_peak
from pipeline.read import suffix
from pipeline.report import read_csv, sha256, volumes_mm3, write_csv, write_json
from pipeline.spec import Spec
from pipeline.types import Case, PathOrStr
from pipeline.write import DESCRIPTION, as_nibabel, write_labels

CASES, VOLUMES, RUN = "cases.csv", "volumes.csv", "run.json"
STEPS = ("read", "preprocess", "network", "invert", "write")
PACKAGES = ("volseg", "monai", "torch", "nibabel", "SimpleITK", "pytorch-ignite", "numpy")
CHANNEL_NUMBER = re.compile(r"_(\d{4})$")
FAILURES = (PipelineError, MemoryError, torch.OutOfMemoryError)  # of one case; the next one goes on
Progress = Callable[[Case, dict[str, Any]], None]


def find_cases(inputs: Sequence[PathOrStr], spec: Spec) -> list[Case]:
    """The cases that files, folders and globs hold, in order.

    A folder is searched with all below it. A model of several channels takes one file a channel, told apart by an ending
    before the suffix: the channel's name (`sub-01_FLAIR.nii.gz`) or its number (`sub-01_0001.nii.gz`). Where the spec names
    a channel that stands in for others, that one's file (or a file that names no channel) serves for those without one.

    Returns:
        dicts of `case` (the output's name, relative, without suffix) and `image` (a path, or one a channel).

    Raises:
        ConfigError: an input that is not there, nothing to do, a channel without a file, or two inputs with one output.
    """
    files = [pair for item in inputs for pair in _files(item)]
    if not files:
        raise ConfigError(f"{', '.join(map(str, inputs))}: no image files there; expected names such as scan.nii.gz")
    cases = [{"case": name, "image": str(path)} for name, path in files]
    if len(spec.channels) > 1:
        cases = _grouped(cases, spec.channels, spec.stand_in)
    _refuse_collisions(cases)
    return cases


def segment(
    model: Model, cases: Sequence[Case], output_dir: PathOrStr, *, overwrite: bool = False, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Segments each case; a case that fails is recorded and the next one goes on.

    The next case is read, and the last one written, while the network computes; not so under a memory limit.

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
    _refuse_mixing(out, identity, overwrite)
    before = {row["case"]: row for row in read_csv(out / CASES)}
    write_json(out / RUN, identity | {"command": sys.argv, "versions": {name: version(name) for name in PACKAGES}})
    rows: list[dict[str, Any]] = []
    record = _recorder(out, before, rows, progress)

    def start(case: Case) -> Prepared | None:
        return _start(model, case, out, before.get(case["case"]), overwrite=overwrite)

    def finish(one: tuple[Case, Prediction | dict[str, Any]]) -> None:
        record(one[0], *_written(model, *one, out))

    named = [{**case, "case": case.get("case") or _name_of(case)} for case in cases]
    beside = model.max_memory is None
    begun = ahead(start, named, beside=beside)
    behind(finish, ((case, _predict(model, case, later, before.get(case["case"]))) for case, later in begun), beside=beside)
    return rows


def _recorder(
    out: Path, before: Mapping[str, Any], rows: list[dict[str, Any]], progress: Progress | None
) -> Callable[[Case, dict[str, Any], dict[str, float] | None], None]:
    """Keeps the tables: a function of a case, its row and its volumes (None where they stay as they are)."""
    done = dict(before)
    volumes: dict[str, dict[str, Any]] = {row["case"]: dict(row) for row in read_csv(out / VOLUMES)}

    def record(case: Case, row: dict[str, Any], sizes: dict[str, float] | None) -> None:
        rows.append(row)
        done[case["case"]] = row
        if sizes is not None:
            volumes[case["case"]] = {"case": case["case"], **sizes}
        elif row["status"] == "failed":
            volumes.pop(case["case"], None)
        write_csv(out / CASES, done.values())
        write_csv(out / VOLUMES, volumes.values())
        if progress is not None:
            progress(case, row)

    return record


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
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and _is_image(p))
        yield from ((_stem(p.relative_to(path)), p) for p in found)
    elif path.exists():
        yield _stem(Path(path.name)), path
    elif has_magic(str(item)):
        parts = Path(item).parts
        root = Path(*parts[: next(i for i, part in enumerate(parts) if has_magic(part))])
        found = sorted(p for p in map(Path, glob(str(item), recursive=True)) if p.is_file() and _is_image(p))
        yield from ((_stem(p.relative_to(root)), p) for p in found)
    else:
        raise ConfigError(f"{path}: no such file or folder")


def _is_image(path: Path) -> bool:
    """Whether a file found in a folder is an input; the .img of a pair is read with its .hdr."""
    kind = suffix(path)
    return kind is not None and not path.name.startswith(".") and kind not in (".img", ".img.gz")


def _stem(path: Path) -> str:
    kind = suffix(path) or path.suffix
    return path.as_posix()[: len(path.as_posix()) - len(kind)]


def _name_of(case: Case) -> str:
    image = case["image"]
    return _stem(Path(Path(image if isinstance(image, str | Path) else image[0]).name))


def _grouped(cases: Sequence[Case], channels: Sequence[str], stand_in: str | None) -> list[Case]:
    """One case for the files that differ in their channel only; the stand-in's file serves channels that have none."""
    groups: dict[str, dict[str, str]] = {}
    for case in cases:
        name, channel = _channel_of(case["case"], channels, stand_in)
        first = groups.setdefault(name, {}).setdefault(channel, case["image"])
        if first != case["image"]:
            raise ConfigError(f"{name}: two files for channel {channel}, expected one: {first} and {case['image']}")
    for name, files in groups.items():
        if stand_in in files:
            groups[name] = files = {channel: files.get(channel, files[stand_in]) for channel in channels}
        missing = [channel for channel in channels if channel not in files]
        if missing:
            raise ConfigError(f"{name}: no file for channel {', '.join(missing)}; found {', '.join(files.values())}")
    return [{"case": name, "image": [files[channel] for channel in channels]} for name, files in groups.items()]


def _channel_of(name: str, channels: Sequence[str], stand_in: str | None) -> tuple[str, str]:
    for channel in channels:
        if name.endswith(f"_{channel}"):
            return name[: -len(channel) - 1], channel
    number = CHANNEL_NUMBER.search(name)
    if number and int(number[1]) < len(channels):
        return name[: number.start()], channels[int(number[1])]
    if stand_in is not None:
        return name, stand_in
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
        "precision": str(getattr(model.evaluator.network, "precision", "")),
    }


def _refuse_mixing(out: Path, identity: dict[str, str], overwrite: bool) -> None:
    if overwrite or not (out / RUN).is_file():
        return
    before = json.loads((out / RUN).read_text(encoding="utf-8"))
    other = [key for key, value in identity.items() if before.get(key) != value]
    if other:
        raise ConfigError(
            f"{out}: holds results of another model or setting ({', '.join(f'{key} {before.get(key)}' for key in other)}); "
            "choose another folder, or --overwrite"
        )


def _start(model: Model, case: Case, out: Path, before: dict[str, Any] | None, *, overwrite: bool) -> Prepared | None:
    """A case, read; None where it is done already. Under a memory limit it is read when its turn comes.

    Raises:
        PipelineError: it cannot be read, or its output is there and is not ours.
    """
    path = output_path(out, case["case"])
    if not overwrite and before is not None and before["status"] in ("done", "skipped") and path.is_file():
        return None
    if before is None and not overwrite:
        _refuse_foreign(path)
    return prepare(model, case["image"]) if model.max_memory is None else Prepared(batch=None, seconds={})


def _predict(
    model: Model, case: Case, begun: Future[Prepared | None], before: dict[str, Any] | None
) -> Prediction | dict[str, Any]:
    """What the network says of a case, or the row of one that was done before or failed."""
    try:
        prepared = begun.result()
        reset_peak()
        if prepared is None:
            return {**(before or {}), "status": "skipped"}
        return compute(model, prepared) if prepared.batch else predict_within(model, case["image"], model.max_memory)
    except FAILURES as error:
        return _row(case, "failed", message=str(error) or "out of memory")


def _written(
    model: Model, case: Case, found: Prediction | dict[str, Any], out: Path
) -> tuple[dict[str, Any], dict[str, float] | None]:
    """The row of a case and its volumes, once its labels are a file; (row, None) where there is nothing new to write."""
    if isinstance(found, dict):
        return found, None
    started = time.perf_counter()
    try:
        write_labels(output_path(out, case["case"]), as_nibabel(found.labels, found.affine, found.header))
    except FAILURES as error:
        return _row(case, "failed", message=str(error) or "out of memory"), None
    found.seconds["write"] = time.perf_counter() - started
    return _row(case, "done", prediction=found), volumes_mm3(found.labels, found.affine, model.spec.labels)


def _refuse_foreign(path: Path) -> None:
    """A file that we did not write is not ours to replace."""
    if path.is_file() and nib.load(path).header.get("descrip") != DESCRIPTION:
        raise WriteError(f"{path}: is there already and was not written by volseg; move it away, or --overwrite")


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
        "peak_memory_mb": f"{peak_bytes() / 2**20:.0f}",
    }
