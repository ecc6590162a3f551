"""Whose results an output folder holds: one model with one set of settings, and one runtime."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.batch.outputs import QUALITY, RUN, OutputFolder
from pipeline.batch.records import read_record, record_files
from pipeline.bundle import code_hash, find_bundle, shipped_bundles, wiring_origin
from pipeline.config import BundlePaths, load_spec, spec_fingerprint
from pipeline.errors import ConfigError
from pipeline.inference import CaseModel
from pipeline.io import (
    WRITTEN_ENDINGS,
    is_written_by_volseg,
    locked,
    read_json,
    temporary_name,
    write_atomically,
)

# To be raised when the voxels of results may change from one version of volseg to the next:
# results of different numbers do not belong together.
RESULTS_VERSION = 1
LABEL_TABLE = "label_table"  # whether label maps hold the names and colours of their labels


def results_identity(model: CaseModel) -> dict[str, str]:
    """Return what must be equal for results to belong together.

    Number of processes, shard, machine and version of the package are no part of it.
    """
    paths = BundlePaths(model.root)
    return {
        "bundle": paths.folder.resolve().name,
        "wiring": _wiring(paths),
        **model.identity(),
        "results_version": str(RESULTS_VERSION),
    }


def _wiring(paths: BundlePaths) -> str:
    """Return `volseg` for wiring that volseg wrote, else the hash of the bundle's code."""
    ours = wiring_origin(paths.inference) in ("current", "released")
    return "volseg" if ours else code_hash(paths.folder)


def settle_identity(
    out: OutputFolder, model: CaseModel, *, overwrite: bool, label_table: bool | None = None
) -> dict[str, str]:
    """Return the identity of an output folder's results: the model's, and what its files hold.

    Args:
        out: the output folder.
        model: an opened bundle.
        overwrite: whether results of another model or setting are removed.
        label_table: whether label maps hold the names and colours of their labels; None as in the
            folder's results, and with them in a new folder.

    Raises:
        ConfigError: the folder holds results of another model or setting.
    """
    wanted = _wanted_identity(out, model, label_table)
    if overwrite:
        _remove_others(out, model, wanted)
    found = _stored(out)
    if found == wanted:
        return wanted
    if found is not None:
        raise ConfigError(_difference(out, found, wanted))
    if not _write_new(out, out.identity, wanted):
        found = _stored(out)  # another run was first
        wanted = _wanted_identity(out, model, label_table)
        if found != wanted:
            raise ConfigError(_difference(out, found or {}, wanted))
    return wanted


def _wanted_identity(
    out: OutputFolder, model: CaseModel, label_table: bool | None
) -> dict[str, str]:
    """Return the identity that the folder's results are to have; see `settle_identity`."""
    wanted, stored = results_identity(model), _stored(out) or {}
    same_model = all(stored.get(key) == text for key, text in wanted.items())
    if label_table is None:
        label_table = has_label_table(stored) if same_model else True
    if same_model and LABEL_TABLE not in stored and not label_table:
        return wanted  # results of a version without this choice, which are to stay as they are
    return {**wanted, LABEL_TABLE: str(label_table)}


def has_label_table(identity: Mapping[str, str]) -> bool:
    """Return whether the label maps of an identity hold the names and colours of their labels."""
    return identity.get(LABEL_TABLE) == str(True)


def _remove_others(out: OutputFolder, model: CaseModel, wanted: Mapping[str, str]) -> None:
    """Remove the results of another model, setting or runtime, and make the folder the model's."""
    try:
        with locked(out.lock):  # or two shards would remove each other's new results
            if _stored(out) not in (None, wanted) or _asks_for_another_runtime(out, model):
                _remove_results(out)
                _write_new(out, out.identity, wanted)
    except OSError as error:
        raise ConfigError(f"{out.root}: its results cannot be removed: {error.strerror}") from error


def settle_runtime(
    out: OutputFolder, model: CaseModel, image: Any = None
) -> Mapping[str, Any] | None:
    """Prepare the network with the runtime and precision that the folder's results have.

    The first process of a folder decides; all others follow, so that voxels do not depend on which
    process computed a case.

    Args:
        out: the output folder.
        model: an opened bundle.
        image: a case by which the model may decide; None before the first case.

    Returns:
        what computes the network; None for a network that is not ours to prepare, and for a model
        that has not decided yet.

    Raises:
        ConfigError: this process cannot follow.
    """
    if model.asked_runtime is None:
        return None
    decided = _stored_runtime(out)
    if decided is not None:
        _follow(model, decided, out)
    description = model.prepare_runtime(image, out.staging)
    if description is None:
        return None
    chosen = {key: str(description[key]) for key in ("runtime", "precision")}
    if decided is None and not _write_new(out, out.runtime, chosen):
        decided = _stored_runtime(out)
    if decided is not None and chosen != decided:
        raise ConfigError(
            f"{out.root}: its results are computed by {_words(decided)}, this process on "
            f"{description['processor']} computes by {_words(chosen)}: "
            "choose another folder, or --overwrite"
        )
    return description


def _follow(model: CaseModel, decided: Mapping[str, str], out: OutputFolder) -> None:
    """Ask for the runtime and precision that were decided, unless others were asked for."""
    for key, asked in (model.asked_runtime or {}).items():
        if asked not in ("auto", decided[key]):
            raise ConfigError(
                f"{out.root}: its results are computed by {_words(decided)}, --{key} {asked} was "
                "asked for: choose another folder, or --overwrite"
            )
    model.follow_runtime(decided)


def _asks_for_another_runtime(out: OutputFolder, model: CaseModel) -> bool:
    """Return whether a model is to be computed in another way than a folder's results."""
    decided, asked = _stored_runtime(out), model.asked_runtime
    if decided is None or asked is None:
        return False
    return any(asked[key] not in ("auto", decided[key]) for key in decided)


def _words(choice: Mapping[str, str]) -> str:
    return f"{choice['runtime']} in {choice['precision']}"


def _stored(out: OutputFolder) -> dict[str, str] | None:
    """Return the identity of a folder's results.

    Returns:
        None where the folder holds none; an empty one for results without a readable identity.
    """
    if out.identity.exists():
        try:
            stored = read_json(out.identity)
            return dict(stored) if isinstance(stored, Mapping) else {}
        except ConfigError:
            return {}
    if (out.root / RUN).exists() or next(record_files(out), None) is not None:
        return {}
    return None


def _stored_runtime(out: OutputFolder) -> dict[str, str] | None:
    with suppress(ConfigError, KeyError, TypeError):
        stored = read_json(out.runtime)
        return {key: str(stored[key]) for key in ("runtime", "precision")}
    return None


def _difference(out: OutputFolder, found: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    advice = "choose another folder, or --overwrite to remove them"
    if not found:
        return (
            f"{out.root}: holds results without volseg's record of how they were made, as versions "
            f"before 0.2 left them: {advice}"
        )
    changed = [key for key in wanted if found.get(key) != wanted[key]]
    listed = ", ".join(f"{key} {found.get(key)}, now {wanted[key]}" for key in changed)
    return f"{out.root}: holds results of another model or setting ({listed}): {advice}"


def _remove_results(out: OutputFolder) -> None:
    """Remove all results of a folder, so that none of another model stays among new ones."""
    for path in list(record_files(out)):
        record = read_record(path)
        for state in record.outputs if record is not None else ():
            remove_output(out, state.path)
        path.unlink(missing_ok=True)
    for folder, _, names in os.walk(out.root):
        for name in names:
            path = Path(folder) / name
            if name.endswith(WRITTEN_ENDINGS) and is_written_by_volseg(path):
                path.unlink(missing_ok=True)
    # the other model may predict no Dice, and then writes no such table
    present = (out.identity, out.runtime, out.labels, out.root / QUALITY)
    for path in (*present, *out.suspects.glob("*.json")):
        path.unlink(missing_ok=True)


def settle_labels(out: OutputFolder, model: CaseModel) -> None:
    """Write the names and values of the labels into an output folder, for those who read it."""
    if not out.labels.exists():
        _write_new(out, out.labels, model.labels)


def read_labels(out: OutputFolder) -> dict[str, int]:
    """Return name → value of the labels in the results of a folder; empty where not known.

    Folders of earlier versions do not hold them: they are those of the shipped bundle that made the
    results, if this version ships the same one.
    """
    with suppress(ConfigError, AttributeError, TypeError, ValueError):
        return {str(name): int(value) for name, value in read_json(out.labels).items()}
    stored = _stored(out) or {}
    with suppress(ConfigError, KeyError, TypeError):
        spec = load_spec(BundlePaths(find_bundle(shipped_bundles() / stored["bundle"])).spec)
        if spec_fingerprint(spec) == stored.get("spec_sha256"):
            return spec.labels
    return {}


def remove_output(out: OutputFolder, relative: str) -> None:
    """Remove a file that a record names, if it lies in the output folder."""
    path = out.root / relative
    if path.parent.resolve().is_relative_to(out.root.resolve()):
        path.unlink(missing_ok=True)


def _write_new(out: OutputFolder, path: Path, content: Mapping[str, Any]) -> bool:
    """Write a JSON file that does not exist yet; return False where another process was first."""
    temporary = out.staging / temporary_name()
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(temporary, text.encode(), staging=out.staging)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        return _write_exclusively(path, temporary.read_bytes())
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _write_exclusively(path: Path, content: bytes) -> bool:
    try:
        with open(path, "xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True
