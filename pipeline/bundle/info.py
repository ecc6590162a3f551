"""What a bundle is, read without evaluating anything in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.bundle.foreign.files import (
    ForeignFacts,
    foreign_configuration,
    foreign_facts,
    hard_cuda,
    parts,
    target,
    weights_hash,
)
from pipeline.bundle.opening import find_bundle
from pipeline.bundle.trust import code_hash, foreign_files
from pipeline.bundle.wiring import WIRING, Origin, wiring_origin
from pipeline.config import BundlePaths, Card, Spec, load_config, load_spec, spec_fingerprint
from pipeline.io import sha256
from pipeline.types import PathOrStr


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleInfo:
    """What a bundle is.

    Attributes:
        folder: the bundle's folder, absolute.
        name: title of its card; None without one.
        version: of its card; None without one.
        labels: name → output value; empty without a spec.
        channels: names of the input channels; empty without a spec.
        wiring: file name → whether it is this version's (`current`), an earlier release's
            (`released`), someone's own (`edited`) or `missing`.
        needs_trust: whether it opens with `trust` only, because its wiring is not volseg's.
        foreign_files: its files that can hold code and are not volseg's, relative to the folder.
        code_sha256: SHA-256 over its configurations and scripts.
        spec_sha256: fingerprint of its spec, the same however the file is written; None without.
        weights_sha256: of its file of weights, or over all of them in a bundle of MONAI's form;
            None without one.
        notes: what a bundle of MONAI's form needs and gives, one sentence each.
    """

    folder: str
    name: str | None
    version: str | None
    labels: dict[str, int]
    channels: tuple[str, ...]
    wiring: dict[str, Origin]
    needs_trust: bool
    foreign_files: tuple[str, ...]
    code_sha256: str
    spec_sha256: str | None
    weights_sha256: str | None
    notes: tuple[str, ...] = ()


def bundle_info(bundle: PathOrStr) -> BundleInfo:
    """Return what a bundle is; nothing in it is evaluated.

    Args:
        bundle: a folder, or the name of a shipped bundle.

    Raises:
        ConfigError: there is no such bundle, or its spec or card is wrong.
    """
    paths = BundlePaths(find_bundle(bundle))
    if foreign_configuration(paths.folder) is not None:
        return _foreign_info(foreign_facts(paths.folder))
    wiring = {name: wiring_origin(paths.configs / name) for name in WIRING}
    edited = [paths.configs / name for name, origin in wiring.items() if origin == "edited"]
    card: Card | None = load_config(Card, paths.card, "card") if paths.card.is_file() else None
    spec: Spec | None = load_spec(paths.spec) if paths.spec.is_file() else None
    return BundleInfo(
        folder=str(paths.folder.resolve()),
        name=card.name if card else None,
        version=list(card.changelog)[-1] if card else None,
        labels=spec.labels if spec else {},
        channels=spec.channels if spec else (),
        wiring=wiring,
        needs_trust=bool(edited),
        foreign_files=tuple(foreign_files(paths.folder, edited)),
        code_sha256=code_hash(paths.folder),
        spec_sha256=spec_fingerprint(spec) if spec else None,
        weights_sha256=sha256(paths.weights) if paths.weights.is_file() else None,
    )


def _foreign_info(facts: ForeignFacts) -> BundleInfo:
    """Return what a bundle of MONAI's form is."""
    folder = facts.folder
    metadata = facts.metadata
    has_weights = BundlePaths(folder).weights.parent.is_dir()
    return BundleInfo(
        folder=str(folder.resolve()),
        name=_text(metadata.get("name") or metadata.get("task")),
        version=_text(metadata.get("version")),
        labels=facts.labels,
        channels=tuple(file.name for file in facts.files),
        wiring={facts.configuration.name: "edited"},
        needs_trust=True,
        foreign_files=tuple(foreign_files(folder, [facts.configuration])),
        code_sha256=code_hash(folder),
        spec_sha256=None,
        weights_sha256=weights_hash(folder) if has_weights else None,
        notes=tuple(_notes(facts)),
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _notes(facts: ForeignFacts) -> Iterator[str]:
    """Yield what a bundle of MONAI's form needs and gives, one sentence each."""
    count = len(facts.files)
    files = ", ".join(file.name for file in facts.files)
    yield (
        f"a case is {count} files: {files} (columns of a manifest, or endings of file names)"
        if count > 1
        else "a case is one file"
    )
    if facts.labels:
        yield f"it gives a label map with {len(facts.labels) - 1} labels"
    elif facts.names:
        names = ", ".join(facts.names.values())
        yield f"its network has the outputs {names}; the values in its label maps have no names"
    else:
        yield "its metadata name no labels"
    inferer = facts.config.get("inferer")
    if isinstance(inferer, dict):
        yield f"its inferer is {target(inferer)}, windows of {inferer.get('roi_size', 'any size')}"
    steps = [target(node) for path, node in parts(facts.config) if path.startswith("postproc")]
    if steps:
        yield f"its postprocessing is {', '.join(step for step in steps if step != 'Compose')}"
    for path in hard_cuda(facts.config):
        yield f"{path} asks for CUDA; --device cpu replaces it where it is a plain device"
    needed = facts.metadata.get("required_packages_version") or facts.metadata.get(
        "optional_packages_version", {}
    )
    if isinstance(needed, dict) and needed:
        yield "it names the packages " + ", ".join(f"{k} {v}" for k, v in needed.items())
    if not any(BundlePaths(facts.folder).weights.parent.glob("*")):
        yield "models/ holds no weights: download them before it is used"
