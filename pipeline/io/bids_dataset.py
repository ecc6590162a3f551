"""The images of a raw BIDS dataset as cases to segment, selected by exact entities.

Only images in `sub-*/[ses-*/]anat` are taken, so nothing of derivatives, sourcedata or code is, and
nothing that the dataset's .bidsignore names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pathspec import GitIgnoreSpec

from pipeline.errors import ConfigError
from pipeline.io.bids_names import (
    ENTITY_NAMES,
    EXTENSIONS,
    BidsName,
    derivative_stem,
    parse_bids_name,
)
from pipeline.io.discovery import LABELS_ENDING, FoundFile, walk
from pipeline.io.formats import printable
from pipeline.io.tables import read_json
from pipeline.types import Case

SEGMENTATION_ENDING = "_dseg.nii.gz"
DATATYPE = "anat"
PARTICIPANTS_TSV = "participants.tsv"
SESSIONS_TSV = "sessions.tsv"  # after the participant's label
SHOWN_LABELS = 30  # in an error; a large dataset has thousands
Labels = tuple[str | None, ...]  # None for images without that entity
ANY = "*"
INDEX_ENTITIES = ("run", "echo", "flip", "inv", "split", "chunk")  # BIDS: run-1 and run-01 are one


@dataclass(frozen=True, kw_only=True, slots=True)
class BidsQuery:
    """Which images of a dataset are segmented.

    Attributes:
        suffixes: one suffix per channel of the model.
        participants: labels of subjects, with or without `sub-`; empty for all.
        sessions: labels of sessions, with or without `ses-`; empty for all.
        entities: short name of an entity → its labels, one of which an image must have.
    """

    suffixes: tuple[str, ...]
    participants: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()
    entities: Mapping[str, Labels] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Image:
    """A file that is wanted by its suffix."""

    path: Path
    name: BidsName
    problem: str = ""


def find_bids_cases(root: Path, query: BidsQuery) -> list[Case]:
    """Return the cases of a BIDS dataset, sorted by path.

    The name of a case is the image's path without extension, or, for a model of several channels,
    also without suffix: then a case is one image per suffix with the same entities. Its outputs
    have the names of BIDS derivatives. An image that cannot be used (a link to data that was not
    fetched, a name that is not BIDS, a missing channel) is a case with a `problem`.

    Raises:
        ConfigError: this is no BIDS dataset, a participant or a session does not exist, no image
            is selected, or two images have the same name.
    """
    images: list[_Image] = []
    cases: list[Case] = []
    seen: set[str] = set()
    subjects, ignored = _subjects(root, query.participants), _ignored(root)
    for subject in subjects:
        for file in _anatomical_files(root, subject, ignored):
            parsed = parse_bids_name(file.path.name)
            seen.add(parsed.suffix if parsed else "")
            problem = _name_problem(root, file, parsed)
            if parsed is None or problem:
                cases += _unusable(root, file, problem, query.suffixes)
            elif parsed.suffix in query.suffixes and parsed.extension:
                images.append(_Image(file.path, parsed, file.problem))
    images = _selected(root, images, query)
    cases += _cases(root, images, query.suffixes)
    if not cases:
        found = ", ".join(sorted(seen - {""})) or "none"
        raise ConfigError(
            f"{printable(root)}: no image sub-*/[ses-*/]{DATATYPE}/*_{query.suffixes[0]}.nii.gz is "
            f"selected; suffixes there: {found}"
        )
    _check_names_differ(cases)
    return sorted(cases, key=lambda case: case["case"])


def read_bids_filter(path: Path, suffix: str) -> dict[str, Labels]:
    """Return which entities an image must have, from a filter file as fMRIPrep reads it.

    The file holds suffixes in lower case → entity → a label, a list of labels, null for images
    without that entity, or "*" for any label: `{"t1w": {"session": "01", "acquisition": null}}`.

    Args:
        path: a JSON file.
        suffix: of the images.

    Returns:
        short name of an entity → labels.

    Raises:
        ConfigError: the file cannot be read, has nothing about the suffix, or names no entity.
    """
    content = read_json(path)
    groups = content if isinstance(content, dict) else {}
    filters = next((groups[key] for key in groups if key.lower() == suffix.lower()), None)
    if not isinstance(filters, dict):
        raise ConfigError(
            f'{path}: expected {{"{suffix.lower()}": {{"session": "01", …}}}}, found '
            f"{', '.join(map(str, groups)) or 'no object'}"
        )
    known = {**ENTITY_NAMES, **{short: short for short in ENTITY_NAMES.values()}}
    labels = {}
    for key, value in filters.items():
        if key == "datatype" and value == DATATYPE:
            continue
        if key not in known:
            raise ConfigError(
                f"{path}: {suffix.lower()}.{key}: no entity of BIDS; expected one of "
                f"{', '.join(ENTITY_NAMES)} (give a suffix by --suffix)"
            )
        labels[known[key]] = _labels(path, f"{suffix.lower()}.{key}", value)
    return labels


def bids_subjects(root: Path) -> list[str]:
    """Return the labels of the subjects of a dataset, sorted, without `sub-`.

    Raises:
        ConfigError: the folder holds none.
    """
    if not root.is_dir():
        raise ConfigError(f"{printable(root)}: no such folder; expected a BIDS dataset")
    labels = [path.name[4:] for path in sorted(root.glob("sub-?*")) if path.is_dir()]
    if not labels:
        raise ConfigError(
            f"{printable(root)}: holds no folder sub-<label>; expected the folder of a BIDS "
            "dataset, which has one per participant"
        )
    return labels


def read_participants(root: Path) -> dict[str, dict[str, str]]:
    """Return participant → the other columns of participants.tsv; empty if there is none.

    Raises:
        ConfigError: the table cannot be read, has no column participant_id, or names a participant
            twice.
    """
    return _keyed_rows(root / PARTICIPANTS_TSV, "participant_id", "sub-")


def read_sessions(root: Path, participant: str) -> dict[str, dict[str, str]]:
    """Return session → the other columns of a participant's sessions.tsv; empty if there is none.

    Args:
        root: the dataset.
        participant: its label, with `sub-`.

    Raises:
        ConfigError: the table cannot be read, has no column session_id, or names a session twice.
    """
    path = root / participant / f"{participant}_{SESSIONS_TSV}"
    return _keyed_rows(path, "session_id", "ses-")


def _keyed_rows(path: Path, key: str, prefix: str) -> dict[str, dict[str, str]]:
    """Return label → the other columns of a table of BIDS; empty if there is no such file.

    Args:
        path: of the table.
        key: its column of labels.
        prefix: of the labels, which a table may leave out.
    """
    if not path.is_file():
        return {}
    try:
        header, *lines = path.read_text(encoding="utf-8-sig").splitlines() or [""]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{printable(path)}: cannot be read as UTF-8 text: {error}") from error
    columns = [name.strip() for name in header.split("\t")]
    if key not in columns:
        raise ConfigError(
            f"{printable(path)}: found the columns {', '.join(columns)}, expected {key}"
        )
    found: dict[str, dict[str, str]] = {}
    for line in filter(str.strip, lines):
        # BIDS has no quotes; a short line lacks its last cells
        row = dict(zip(columns, (cell.strip() for cell in line.split("\t")), strict=False))
        name = f"{prefix}{row.pop(key, '').removeprefix(prefix)}"
        if name in found:
            raise ConfigError(f"{printable(path)}: {printable(name)} has two rows; keep one")
        found[name] = row
    return found


def _labels(path: Path, key: str, value: object) -> Labels:
    values = value if isinstance(value, list) else [value]
    if not values or not all(item is None or isinstance(item, str | int) for item in values):
        raise ConfigError(
            f'{path}: {key}: expected a label, a list of labels, null or "*", got {value!r}'
        )
    return tuple(None if item is None else str(item) for item in values)


def _subjects(root: Path, wanted: Sequence[str]) -> list[str]:
    existing = bids_subjects(root)
    labels = [label.removeprefix("sub-") for label in wanted]
    _check_known(root, "participant", labels, existing)
    return [label for label in existing if not labels or label in labels]


def _check_known(root: Path, kind: str, wanted: Sequence[str], existing: Collection[str]) -> None:
    """Raise an error that lists the labels that exist, if one that is wanted does not."""
    unknown = [label for label in dict.fromkeys(wanted) if label not in existing]
    if not unknown:
        return
    shown = sorted(existing)[:SHOWN_LABELS]
    more = f", … ({len(existing)} in all)" if len(existing) > len(shown) else ""
    raise ConfigError(
        f"{printable(root)}: no {kind} {', '.join(map(printable, unknown))}; there are "
        f"{', '.join(map(printable, shown)) or 'none'}{more}"
    )


def _anatomical_files(root: Path, subject: str, ignored: GitIgnoreSpec) -> Iterator[FoundFile]:
    """Yield the images in the folders `anat` of a subject, and what could not be searched."""
    folder = root / f"sub-{subject}"

    def enter(child: Path) -> bool:
        return child.name == DATATYPE or (child.name.startswith("ses-") and child.parent == folder)

    for file in walk(folder, enter=enter):
        inside = file.path.parent.name == DATATYPE
        searched = inside or file.path.is_dir()
        if searched and not ignored.match_file(file.path.relative_to(root)):
            yield file


def _ignored(root: Path) -> GitIgnoreSpec:
    """Return the patterns of the dataset's .bidsignore, which are those of .gitignore."""
    try:
        text = (root / ".bidsignore").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    return GitIgnoreSpec.from_lines(text.splitlines())


def _name_problem(root: Path, file: FoundFile, name: BidsName | None) -> str:
    """Return why a file is no image of BIDS; empty if it is one."""
    if file.path.is_dir() or name is None:
        return file.problem or (
            "no name of BIDS; expected entities, a suffix and .nii.gz, as in "
            "sub-01_ses-1_run-2_T1w.nii.gz"
        )
    folders = dict.fromkeys(("sub", "ses"), "")
    for part in file.path.relative_to(root).parts[:-1]:
        key, _, label = part.partition("-")
        folders[key] = label
    for key in ("sub", "ses"):
        if folders[key] != name.entities.get(key, ""):
            return (
                f"its name says {key}-{name.entities.get(key, '')}, its folder {key}-{folders[key]}"
            )
    return ""


def _unusable(root: Path, file: FoundFile, problem: str, suffixes: Sequence[str]) -> Iterator[Case]:
    """Yield a case for a file or folder that cannot be used, if it may be an image to segment."""
    stem = file.path.name
    for extension in EXTENSIONS:
        stem = stem.removesuffix(extension)
    named = stem.endswith(tuple(f"_{suffix}" for suffix in suffixes)) and stem != file.path.name
    if named or file.path.is_dir():
        name = file.path.relative_to(root).with_name(stem).as_posix()
        text = f"{printable(file.path)}: {problem}"
        yield Case(case=name, image=str(file.path), problem=text)


def _selected(root: Path, images: Iterable[_Image], query: BidsQuery) -> list[_Image]:
    """Return the images of the sessions and with the entities that are wanted."""
    images = list(images)
    sessions = [label.removeprefix("ses-") for label in query.sessions]
    existing = {image.name.entities["ses"] for image in images if "ses" in image.name.entities}
    _check_known(root, "session", sessions, existing)
    return [
        image
        for image in images
        if (not sessions or image.name.entities.get("ses") in sessions)
        and all(_has_label(image.name, key, labels) for key, labels in query.entities.items())
    ]


def _has_label(name: BidsName, key: str, wanted: Labels) -> bool:
    """Return whether a name has one of the labels; indices are compared as numbers."""
    found = name.entities.get(key)
    if found is None:
        return None in wanted
    if key in INDEX_ENTITIES and found.isdigit():
        numbers = [int(label) for label in wanted if label and label.isdigit()]
        return int(found) in numbers or ANY in wanted
    return found in wanted or ANY in wanted


def _cases(root: Path, images: Iterable[_Image], suffixes: Sequence[str]) -> list[Case]:
    """Return one case per image, or per image of each suffix for several channels."""
    if len(suffixes) == 1:
        return [_case(root, [image], image.name, image.problem) for image in images]
    groups: dict[tuple[Path, str], dict[str, _Image]] = {}
    for image in images:
        key = (image.path.parent, image.name.entity_text)
        groups.setdefault(key, {})[image.name.suffix] = image
    cases = []
    for group in groups.values():
        missing = [suffix for suffix in suffixes if suffix not in group]
        found = [group[suffix] for suffix in suffixes if suffix in group]
        problem = next((image.problem for image in found if image.problem), "")
        if missing:
            problem = f"no image {', '.join(missing)} with the same entities"
        cases.append(_case(root, found, BidsName(entities=found[0].name.entities), problem))
    return cases


def _case(root: Path, images: Sequence[_Image], name: BidsName, problem: str) -> Case:
    folder = images[0].path.parent.relative_to(root)
    stem = "_".join(filter(None, (name.entity_text, name.suffix)))
    paths = [str(image.path) for image in images]
    columns = {"participant_id": f"sub-{name.entities['sub']}"}
    if "ses" in name.entities:
        columns["session_id"] = f"ses-{name.entities['ses']}"
    output = (folder / f"{derivative_stem(name)}{SEGMENTATION_ENDING}").as_posix()
    case = Case(
        case=(folder / stem).as_posix(),
        image=paths[0] if len(paths) == 1 else paths,
        columns=columns,
        outputs={LABELS_ENDING: output},
    )
    if problem:
        case["problem"] = f"{printable(paths[0])}: {problem}"
    return case


def _check_names_differ(cases: Sequence[Case]) -> None:
    images: dict[str, list[str]] = {}
    for case in cases:
        images.setdefault(case["case"], []).append(str(case["image"]))
    name, twice = next(
        ((name, paths) for name, paths in images.items() if len(paths) > 1), ("", [])
    )
    if twice:
        raise ConfigError(f"{printable(name)}: {' and '.join(map(printable, twice))}: keep one")
