"""Names of files in BIDS: entities, a suffix and an extension, as in sub-01_run-2_T1w.nii.gz.

References:
    Entities and their order: https://bids-specification.readthedocs.io, appendix "Entities".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

ENTITY = re.compile(r"([A-Za-z]+)-([A-Za-z0-9+]+)")
SUFFIX = re.compile(r"[A-Za-z0-9]+")
EXTENSIONS = (".nii.gz", ".nii")
# long names of entities, as filter files use them → the short names in file names
ENTITY_NAMES: Mapping[str, str] = {
    "subject": "sub",
    "session": "ses",
    "sample": "sample",
    "task": "task",
    "acquisition": "acq",
    "ceagent": "ce",
    "reconstruction": "rec",
    "direction": "dir",
    "run": "run",
    "modality": "mod",
    "echo": "echo",
    "flip": "flip",
    "inversion": "inv",
    "mtransfer": "mt",
    "part": "part",
    "processing": "proc",
    "hemisphere": "hemi",
    "space": "space",
    "split": "split",
    "recording": "recording",
    "chunk": "chunk",
    "segmentation": "seg",
    "resolution": "res",
    "density": "den",
    "label": "label",
    "description": "desc",
}
DESCRIPTION = "volseg"  # label of the entity `desc` in all derivatives
PLAIN_SUFFIX = "T1w"  # the only suffix that derivatives do not name


@dataclass(frozen=True, kw_only=True, slots=True)
class BidsName:
    """A file's name, split into its parts.

    Attributes:
        entities: short name → label, in the order of the file name; `sub` is the first.
        suffix: such as T1w; empty for the images of several suffixes together.
        extension: with its dot; empty for a name without.
    """

    entities: Mapping[str, str]
    suffix: str = ""
    extension: str = ""

    @property
    def entity_text(self) -> str:
        """The name up to its suffix, such as `sub-01_ses-1`."""
        return "_".join(f"{key}-{label}" for key, label in self.entities.items())


def parse_bids_name(name: str) -> BidsName | None:
    """Return the parts of a file's name; None if it is no BIDS name.

    Args:
        name: name of an image, with or without its extension, or path that ends with it.

    >>> parse_bids_name("sub-01_acq-highres_T1w.nii.gz").entities
    {'sub': '01', 'acq': 'highres'}
    >>> parse_bids_name("sub-01_T1w_old.nii.gz") is None
    True
    """
    base = PurePosixPath(name).name
    extension = next((end for end in EXTENSIONS if base.endswith(end)), "")
    words = base.removesuffix(extension).split("_")
    suffix = "" if ENTITY.fullmatch(words[-1]) else words.pop()
    pairs = [ENTITY.fullmatch(word) for word in words]
    entities = {pair[1]: pair[2] for pair in pairs if pair}
    complete = len(entities) == len(words) and next(iter(entities), "") == "sub"
    if not complete or (suffix and not SUFFIX.fullmatch(suffix)):
        return None
    return BidsName(entities=entities, suffix=suffix, extension=extension)


def derivative_stem(image: BidsName) -> str:
    """Return the name of an image's derivatives up to their suffix.

    All entities of the image stay; `desc` says what made the derivative, and also which image it is
    of where that is no plain T1w image, so that no two images have the same derivative.

    >>> derivative_stem(parse_bids_name("sub-01_run-2_T1w.nii.gz"))
    'sub-01_run-2_desc-volseg'
    >>> derivative_stem(parse_bids_name("sub-01_desc-preproc_FLAIR.nii.gz"))
    'sub-01_desc-volsegFLAIRPreproc'
    """
    kept = {key: label for key, label in image.entities.items() if key != "desc"}
    suffix = "" if image.suffix == PLAIN_SUFFIX else image.suffix
    described = image.entities.get("desc", "")
    label = f"{DESCRIPTION}{suffix}{described[:1].upper()}{described[1:]}"
    return f"{BidsName(entities=kept).entity_text}_desc-{label}"
