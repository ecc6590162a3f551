"""A new bundle without weights, which passes every check that needs none."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from pipeline.bundle import (
    BUNDLE_NAME,
    BUNDLE_NAME_RULE,
    NO_LICENCE,
    PLACEHOLDER,
    check_plain,
    find_bundle,
    refresh_bundle,
    shipped_bundles,
)
from pipeline.config import (
    BundlePaths,
    Card,
    Run,
    Spec,
    parse_config,
    read_yaml,
)
from pipeline.errors import ConfigError
from pipeline.io import write_atomically
from pipeline.report import draft_page
from pipeline.training.planning.files import (
    CARD_HEADING,
    SPEC_HEADING,
    draft_card,
    write_yaml,
)

TEMPLATES = ("3d", "2d")
BUNDLE_OF = {"brain": "brain_mr_structures"}  # short name → the shipped bundle it stands for
APACHE = "Apache-2.0"
LICENCES = (APACHE, "MIT", "CC-BY-4.0", "none")
BACKGROUND = "background"
# Keys of a spec that do not depend on which structures there are
GENERAL_KEYS = (
    "channels",
    "orientation",
    "spacing",
    "intensity",
    "channel_intensity",
    "roi_size",
    "slice_axis",
    "overlap",
    "foreground_threshold",
    "localise",
    "fallback_channel",
    "crop_resize",
    "resampling",
    "crop_to_nonzero",
    "network",
)
COMMENTS = {
    "spacing": "mm along the axes of `orientation`; null keeps the voxel size of each scan",
    "roi_size": "voxels of a window along the same axes",
    "network": "`features`: channels of each level; each level halves the size of the one above",
}
RUN_COMMENTS = {
    "dataset": "folder of images and label maps; see docs/train.md of volseg for its layouts",
    "batch_size": "windows per step",
}
BATCH_SIZE = {2: 16, 3: 2}  # windows per step; a window of 3D has as many voxels as 24 of 2D
DATASET = "data"
FIRST_VERSION = "0.1.0"


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """What a new bundle is made of.

    Attributes:
        title: name that people read.
        like: `3d`, `2d`, `brain`, or another bundle whose settings are taken.
        labels: name → value, without the background; empty takes those of `like`.
        channels: names of the input channels; empty takes those of `like`.
        authors: authors and holders of the copyright; empty if they are named later.
        licence: one of `LICENCES`, or a file with the text of another one.
    """

    title: str
    like: str = "3d"
    labels: Mapping[str, int]
    channels: Sequence[str] = ()
    authors: str = ""
    licence: str = APACHE


def new_bundle(folder: Path, draft: Draft) -> list[str]:
    """Write a bundle without weights and return the names of its files, relative to it.

    Nothing is written unless everything can be.

    Raises:
        ConfigError: the folder is not empty, or a name, a label or the licence is wrong.
    """
    _check_folder(folder)
    paths = BundlePaths(folder)
    content = _spec_content(draft)
    spec: Spec = parse_config(Spec, content, "spec")
    card_content = _card_content(draft, spec)
    card: Card = parse_config(Card, card_content, "card")
    check_plain(
        {**card_content, "labels": list(spec.labels), "channels": list(spec.channels)}, "bundle"
    )
    run = _run_content(paths, spec)
    parse_config(Run, run, "run")
    licence = _licence_text(draft)
    write_yaml(paths.spec, content, COMMENTS, SPEC_HEADING)
    write_yaml(paths.card, card_content, {}, CARD_HEADING)
    write_yaml(paths.run, run, RUN_COMMENTS, f"A training run: volseg train {paths.run}")
    write_atomically(paths.licence, licence.encode())
    page = draft_page(card, spec, str(folder))
    write_atomically(paths.readme, page.encode())
    refresh_bundle(folder)
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def parse_labels(text: str) -> dict[str, int]:
    """Return the labels in a text such as `anterior,posterior` or `left=17,right=53`.

    Without values they are 1, 2, 3 … in their order.

    Raises:
        ConfigError: a name is empty or there twice, a value is no number, or only some have one.
    """
    names = [part.strip() for part in text.split(",")]
    pairs = [re.fullmatch(r"(.*?)\s*(?:=\s*(\d+))?", name) for name in names]
    found = [(pair[1], pair[2]) for pair in pairs if pair is not None]
    given = [value for _, value in found if value is not None]
    if any(not name or "=" in name or name == BACKGROUND for name, _ in found):
        raise ConfigError(
            f"labels {text!r}: expected names separated by commas, each with =VALUE (a number) or "
            f"without; {BACKGROUND} is always 0 and is not named"
        )
    if len({name for name, _ in found}) < len(found):
        raise ConfigError(f"labels {text!r}: a name is there twice; expected each one once")
    if given and len(given) < len(found):
        raise ConfigError(
            f"labels {text!r}: {len(given)} of {len(found)} have a value; expected one for all, "
            "or for none"
        )
    return {
        name: number if value is None else int(value)
        for number, (name, value) in enumerate(found, start=1)
    }


def _check_folder(folder: Path) -> None:
    """Raise a ConfigError if a bundle cannot be written into a folder, or has an odd name."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; expected a new folder for the bundle")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"{folder}: is not empty, and nothing is written over it; choose another name, or move "
            "it away"
        )
    name = folder.resolve().name
    if not BUNDLE_NAME.fullmatch(name):
        raise ConfigError(
            f"{folder}: {name!r} is no name of a bundle; expected {BUNDLE_NAME_RULE}, such as "
            "hippocampus_mr_3d"
        )


def _spec_content(draft: Draft) -> dict[str, Any]:
    """Return the content of spec.yaml."""
    base = _base(draft.like)
    # the second network of a cascade would need weights of its own
    base.pop("cascade", None)
    if any(not name for name in draft.channels):
        raise ConfigError(f"channels {','.join(draft.channels)!r}: a name is empty")
    if draft.channels:
        base["channels"] = list(draft.channels)
        # both name channels of the other bundle
        base.pop("fallback_channel", None)
        base.pop("channel_intensity", None)
    if not draft.labels:
        if "labels" not in base:
            raise ConfigError(
                f"--like {draft.like} has no labels of its own; name those of the bundle, for "
                "example --labels anterior,posterior"
            )
        return base
    general = {key: base[key] for key in GENERAL_KEYS if key in base}
    return {"labels": {BACKGROUND: 0, **draft.labels}, **general}


def _base(like: str) -> dict[str, Any]:
    """Return the spec that a new bundle begins with."""
    if like in TEMPLATES:
        path = Path(str(files("pipeline.bundle") / "templates" / f"new_{like}.yaml"))
    else:
        path = BundlePaths(find_bundle(BUNDLE_OF.get(like, like))).spec
    if not path.is_file():
        raise ConfigError(
            f"{like}: has no configs/spec.yaml; expected {', '.join((*TEMPLATES, *BUNDLE_OF))}, or "
            "a bundle of volseg's"
        )
    content: dict[str, Any] = read_yaml(path, "spec")
    return content


def _card_content(draft: Draft, spec: Spec) -> dict[str, Any]:
    """Return the content of card.yaml."""
    if not draft.title.strip() or "\n" in draft.title:
        raise ConfigError(f"the name {draft.title!r} is no title; expected one line of text")
    content = draft_card(draft.title.strip(), list(spec.labels), PLACEHOLDER)
    if draft.authors:
        content |= {"authors": draft.authors, "copyright": f"{_year()} {draft.authors}"}
    return content | {"changelog": {FIRST_VERSION: "first version"}}


def _run_content(paths: BundlePaths, spec: Spec) -> dict[str, Any]:
    """Return the content of run.yaml."""
    return {
        "bundle": str(paths.folder),
        "dataset": DATASET,
        "epochs": 100,
        "batch_size": BATCH_SIZE[spec.spatial_dims],
        "learning_rate": 0.002,
        "precision": "auto",
    }


def _licence_text(draft: Draft) -> str:
    """Return the text of LICENSE."""
    if draft.licence == "none":
        return NO_LICENCE
    if draft.licence == APACHE:
        # the shipped bundles have it, whole
        return BundlePaths(shipped_bundles() / BUNDLE_OF["brain"]).licence.read_text("utf-8")
    if draft.licence in LICENCES:
        template = files("pipeline.bundle") / "templates" / f"licence_{draft.licence}.txt"
        authors = draft.authors or "the authors of the weights"
        return template.read_text("utf-8").format(year=_year(), authors=authors)
    try:
        text = Path(draft.licence).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the licence {draft.licence!r}: is none of {', '.join(LICENCES)}, and no text can be "
            f"read from a file of that name ({error})"
        ) from error
    if not text.strip():
        raise ConfigError(f"{draft.licence}: is empty; expected the text of a licence")
    return text


def _year() -> int:
    return datetime.datetime.now(tz=datetime.UTC).year
