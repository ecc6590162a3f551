"""Many cases, one after the other: what is to be done, what was done, what failed and why."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pipeline.batch.prefetch import prefetch, write_behind
from pipeline.errors import ConfigError, PipelineError, WriteError, unwrap
from pipeline.inference import (
    Model,
    Prediction,
    PreparedCase,
    peak_bytes,
    predict_prepared,
    predict_within,
    prepare,
    reset_peak,
)
from pipeline.io import (
    as_nibabel,
    case_name,
    fractions_as_nibabel,
    is_written_by_volseg,
    read_csv,
    sha256,
    write_csv,
    write_json,
    write_labels,
)
from pipeline.types import Case, PathOrStr

CASES, VOLUMES, RUN = "cases.csv", "volumes.csv", "run.json"
STEPS = ("read", "preprocess", "network", "invert", "write")
PACKAGES = ("volseg", "monai", "torch", "nibabel", "SimpleITK", "pytorch-ignite", "numpy")
Progress = Callable[[Case, dict[str, Any]], None]


def segment_cases(
    model: Model,
    cases: Sequence[Case],
    output_dir: PathOrStr,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
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
    anew = _is_of_another_model(out, identity, overwrite)
    before = {} if anew else {row["case"]: row for row in read_csv(out / CASES)}
    volumes = {} if anew else {row["case"]: row for row in read_csv(out / VOLUMES)}
    write_json(
        out / RUN,
        identity | {"command": sys.argv, "versions": {name: version(name) for name in PACKAGES}},
    )
    rows: list[dict[str, Any]] = []
    record = _recorder(out, before, volumes, rows, progress)

    def start(case: Case) -> PreparedCase | None:
        return _start(model, case, out, before.get(case["case"]), overwrite=overwrite)

    def finish(one: tuple[Case, Prediction | dict[str, Any]]) -> None:
        record(one[0], *_written(model, *one, out))

    named = [{**case, "case": case.get("case") or case_name(case)} for case in cases]
    beside = model.max_memory is None
    begun = prefetch(start, named, beside=beside)
    write_behind(
        finish,
        ((case, _predict(model, case, later, before.get(case["case"]))) for case, later in begun),
        beside=beside,
    )
    return rows


def _recorder(
    out: Path,
    before: Mapping[str, Any],
    volumes: dict[str, Any],
    rows: list[dict[str, Any]],
    progress: Progress | None,
) -> Callable[[Case, dict[str, Any], dict[str, float] | None], None]:
    """Keeps the tables: a function of a case, its row and its volumes (None where they stay as they are)."""
    done = dict(before)

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
    rows = segment_cases(model, cases, output_dir, overwrite=True)
    failed = [f"{row['case']}: {row['message']}" for row in rows if row["status"] == "failed"]
    if failed:
        raise PipelineError(
            f"{len(failed)} of {len(rows)} cases failed, the others are written:\n"
            + "\n".join(failed)
        )


def output_path(output_dir: Path, case: str) -> Path:
    """Where a case's label map goes."""
    return output_dir / f"{case}_seg.nii.gz"


def uncertainty_path(output_dir: Path, case: str) -> Path:
    """Where a case's uncertainty goes, if it is asked for."""
    return output_dir / f"{case}_uncertainty.nii.gz"


def _identity(model: Model) -> dict[str, str]:
    """What must be equal for results to belong together."""
    root = Path(model.root)
    return {
        "bundle": root.resolve().name,
        "weights_sha256": sha256(root / "models" / "model.pt"),
        "spec_sha256": sha256(root / "configs" / "spec.yaml"),
        "overlap": str(getattr(model.evaluator.inferer, "overlap", "")),
        "precision": str(getattr(model.evaluator.network, "precision", "")),
        **{
            key: str(getattr(model.preprocessing.transforms[0], key, None))
            for key in ("volume", "labels_spacing")
        },
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


def _start(
    model: Model, case: Case, out: Path, before: dict[str, Any] | None, *, overwrite: bool
) -> PreparedCase | None:
    """A case, read; None where it is done already. Under a memory limit it is read when its turn comes.

    Raises:
        PipelineError: it cannot be read, or its output is there and is not ours.
    """
    path = output_path(out, case["case"])
    whole = path.is_file() and (
        not model.uncertainty or uncertainty_path(out, case["case"]).is_file()
    )
    if not overwrite and before is not None and before["status"] in ("done", "skipped") and whole:
        return None
    if not overwrite and path.is_file() and not is_written_by_volseg(path):
        raise WriteError(
            f"{path}: is there already and was not written by volseg; move it away, or --overwrite"
        )
    return (
        prepare(model, case["image"])
        if model.max_memory is None
        else PreparedCase(batch=None, seconds={})
    )


def _predict(
    model: Model, case: Case, begun: Future[PreparedCase | None], before: dict[str, Any] | None
) -> Prediction | dict[str, Any]:
    """What the network says of a case, or the row of one that was done before or failed."""
    try:
        prepared = begun.result()
        reset_peak()
        if prepared is None:
            return {**(before or {}), "status": "skipped"}
        return (
            predict_prepared(model, prepared)
            if prepared.batch
            else predict_within(model, case["image"], model.max_memory)
        )
    except Exception as error:
        return _row(case, "failed", message=_reason(error))


def _written(
    model: Model, case: Case, found: Prediction | dict[str, Any], out: Path
) -> tuple[dict[str, Any], dict[str, float] | None]:
    """The row of a case and its volumes, once its labels are a file; (row, None) where there is nothing new to write."""
    if isinstance(found, dict):
        return found, None
    started = time.perf_counter()
    try:
        if found.uncertainty is not None:
            write_labels(
                uncertainty_path(out, case["case"]),
                fractions_as_nibabel(found.uncertainty, found.affine, found.header),
            )
        write_labels(
            output_path(out, case["case"]), as_nibabel(found.labels, found.affine, found.header)
        )
    except Exception as error:
        return _row(case, "failed", message=_reason(error)), None
    found.seconds["write"] = time.perf_counter() - started
    return _row(case, "done", prediction=found), found.volumes_mm3


def _reason(error: BaseException) -> str:
    """Why a case failed; whatever it was, the other cases go on."""
    known = unwrap(error)
    if known is not None:
        return str(known)
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(
        error
    ):
        return f"out of memory ({error}); free some, or use a machine with more"
    return f"unexpected {type(error).__name__}: {error} (a bug of volseg: please report it)"


def _row(
    case: Case, status: str, *, message: str = "", prediction: Prediction | None = None
) -> dict[str, Any]:
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
