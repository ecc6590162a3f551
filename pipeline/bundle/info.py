"""What a bundle is, read without evaluating anything in it."""

from __future__ import annotations

from dataclasses import dataclass

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
        weights_sha256: of its file of weights; None without one.
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


def bundle_info(bundle: PathOrStr) -> BundleInfo:
    """Return what a bundle is; nothing in it is evaluated.

    Args:
        bundle: a folder, or the name of a shipped bundle.

    Raises:
        ConfigError: there is no such bundle, or its spec or card is wrong.
    """
    paths = BundlePaths(find_bundle(bundle))
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
