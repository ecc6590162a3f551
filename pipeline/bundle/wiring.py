"""The wiring of a bundle: `inference.yaml` and its overlay `train.yaml`.

volseg writes both from its templates. A bundle that an earlier release wrote is recognised by the
hash of its wiring and opens with the present templates instead; wiring that someone edited is code
of their own: it is used only where it is trusted, and never overwritten without being asked.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from monai.bundle import ConfigParser

from pipeline.bundle.metadata import bundle_metadata
from pipeline.bundle.trust import require_trust
from pipeline.config import RENAMED_SPEC_KEYS, BundlePaths
from pipeline.io import write_atomically, write_json
from pipeline.log import LOGGER
from pipeline.types import PathOrStr

WIRING = ("inference.yaml", "train.yaml")
NO_LICENCE = """\
No licence has been chosen for these weights: all rights are reserved by their authors.
Put the text of a licence here before you share them.
"""
Origin = Literal["missing", "current", "released", "edited"]

# SHA-256 of the wiring that earlier releases wrote → the release
RELEASED = {
    "dcfb41197a6c2db11e67ea2c0c5e13ceee828ab7ddfc29bd985d6efc7015f9b7": "0.1.0",
    "bc5268b4c348ac91698d4ae92bbe1c5b1fba371349ac0732779d3b600ee90041": "0.1.0",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Refreshed:
    """The generated files of a bundle after `refresh_bundle`.

    Attributes:
        written: file names in `configs/` that are now as this version writes them.
        kept: wiring that its owner edited, and that stays.
    """

    written: tuple[str, ...]
    kept: tuple[str, ...]


def template(name: str) -> Path:
    """Return the path of the wiring as this version writes it, `inference.yaml` or `train.yaml`."""
    return Path(str(files("pipeline.bundle") / "templates" / name))


def wiring_origin(path: Path) -> Origin:
    """Return whether a wiring file is this version's, an earlier release's, or edited."""
    if not path.is_file():
        return "missing"
    content = path.read_bytes()
    if content == template(path.name).read_bytes():
        return "current"
    return "released" if hashlib.sha256(content).hexdigest() in RELEASED else "edited"


def read_wiring(
    root: PathOrStr, names: Sequence[str] = WIRING, *, trust: bool = False
) -> ConfigParser:
    """Return a bundle's wiring, read and not yet instantiated.

    Args:
        root: the bundle's folder.
        names: `inference.yaml`, or both for training.
        trust: whether wiring that volseg did not write may be evaluated.

    Raises:
        ConfigError: the wiring is not volseg's and not trusted.
    """
    paths = BundlePaths(root)
    files_to_read = wiring_to_evaluate(root, names, trust=trust)
    _log_renewal(paths, names)
    parser = ConfigParser()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI warns at every read that configurations run code
        parser.read_config(files_to_read)
    parser["bundle_root"] = literal(str(root))
    return parser


def wiring_to_evaluate(
    root: PathOrStr, names: Sequence[str] = WIRING, *, trust: bool = False
) -> list[Path]:
    """Return the files to read as a bundle's wiring.

    Every evaluation of wiring starts here. volseg's own wiring is read from the templates and not
    from the bundle, so that what was compared is what runs.

    Args:
        root: the bundle's folder.
        names: `inference.yaml`, or both for training.
        trust: whether wiring that volseg did not write may be evaluated.

    Raises:
        ConfigError: the wiring is not volseg's and not trusted.
    """
    chosen, edited = [], []
    for name in names:
        path = BundlePaths(root).configs / name
        origin = wiring_origin(path)
        chosen.append(template(name) if origin in ("current", "released") else path)
        if origin == "edited":
            edited.append(path)
    if edited:
        require_trust(root, edited, trust=trust)
    return chosen


def literal(text: str) -> str:
    """Return an expression for MONAI's parser that gives a text, whatever characters it has.

    The parser evaluates a string that starts with `$`, and replaces `#` by `::` in any: both may be
    in the name of a folder.
    """
    encoded = text.encode("utf-8", "surrogateescape").hex()
    return f"$bytes.fromhex('{encoded}').decode('utf-8', 'surrogateescape')"


def _log_renewal(paths: BundlePaths, names: Sequence[str]) -> None:
    """Log one line if an earlier release wrote any of a bundle's wiring."""
    for name in names:
        path = paths.configs / name
        if wiring_origin(path) == "released":
            LOGGER.warning(
                "%s: its wiring is that of volseg %s and was renewed in memory; "
                "`volseg bundle refresh %s` rewrites it",
                path,
                RELEASED[hashlib.sha256(path.read_bytes()).hexdigest()],
                paths.folder,
            )
            return


def refresh_bundle(root: PathOrStr, *, overwrite: bool = False) -> Refreshed:
    """Write what is generated in a bundle: its wiring and metadata.json.

    Keys of the spec that an earlier release named otherwise get their present names. A bundle
    without LICENSE gets one with the text `NO_LICENCE`.

    Args:
        root: the bundle's folder, with spec.yaml and card.yaml.
        overwrite: whether wiring that its owner edited is replaced too.
    """
    paths = BundlePaths(root)
    written, kept = [], []
    if _rename_spec_keys(paths.spec):
        written.append(paths.spec.name)
    for name in WIRING:
        own = paths.configs / name
        if wiring_origin(own) == "edited" and not overwrite:
            kept.append(name)
            continue
        write_atomically(own, template(name).read_bytes())
        written.append(name)
    if not paths.licence.is_file():
        write_atomically(paths.licence, NO_LICENCE.encode())
    write_json(paths.metadata, bundle_metadata(paths.folder))
    written.append(paths.metadata.name)
    return Refreshed(written=tuple(written), kept=tuple(kept))


def _rename_spec_keys(path: Path) -> bool:
    """Rename the top-level keys of a spec of an earlier release; comments and order stay."""
    before = path.read_text(encoding="utf-8")
    text = before
    for old, new in RENAMED_SPEC_KEYS.items():
        text = re.sub(rf"^{old}:", f"{new}:", text, flags=re.MULTILINE)
    if text == before:
        return False
    write_atomically(path, text.encode())
    return True
