"""The table of a BIDS dataset: one row per image, with facts of its participant and session."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.batch.bids_derivatives import (
    GROUP_JSON,
    GROUP_TSV,
    json_text,
    table_text,
    write_if_different,
)
from pipeline.batch.outputs import OutputFolder
from pipeline.batch.reading import read_results
from pipeline.batch.records import CaseRecord
from pipeline.batch.tables import WARNING_SEPARATOR
from pipeline.errors import ConfigError
from pipeline.io import (
    ENTITY_NAMES,
    PARTICIPANTS_TSV,
    SESSIONS_TSV,
    parse_bids_name,
    read_json,
    read_participants,
    read_sessions,
)

PARTICIPANT, SESSION = "participant_id", "session_id"
PARTICIPANTS_JSON, SESSIONS_JSON = "participants.json", "sessions.json"
FACTS = {
    PARTICIPANT: {"Description": "Label of the participant, with sub-."},
    SESSION: {"Description": "Label of the session, with ses-."},
    "image": {"Description": "Path of the image in the raw dataset, without its extension."},
    "status": {"Description": "What became of the image; failed and quarantined have no volumes."},
    "warnings": {"Description": "Reasons to look at the segmentation before its volumes are used."},
}
Row = dict[str, Any]
Rows = Mapping[str, Mapping[str, str]]  # label → column → value


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupTable:
    """The table of a dataset.

    Attributes:
        path: its file.
        rows: number of images.
        unknown: participants with images who are not in participants.tsv.
        without_image: participants in participants.tsv without an image in the results.
        unknown_sessions: participant and session of images, where the participant has a
            sessions.tsv that does not name the session.
        in_both: columns of participants.tsv and of sessions.tsv → column of the session's value.
    """

    path: Path
    rows: int
    unknown: Sequence[str]
    without_image: Sequence[str]
    unknown_sessions: Sequence[str] = ()
    in_both: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Facts:
    """What the dataset's own tables say of images.

    Attributes:
        participants: participant → column → value.
        sessions: participant → session → column → value.
    """

    participants: Rows
    sessions: Mapping[str, Rows]

    @classmethod
    def of(cls, dataset: Path, records: Iterable[CaseRecord]) -> _Facts:
        """Read the tables; sessions.tsv of the participants with sessions in the results."""
        names = {item.columns[PARTICIPANT] for item in records if item.columns.get(SESSION)}
        return cls(
            participants=read_participants(dataset),
            sessions={name: read_sessions(dataset, name) for name in sorted(names)},
        )

    def of_participant(self, record: CaseRecord) -> Mapping[str, str]:
        """Return column → value of an image's participant."""
        return self.participants.get(record.columns[PARTICIPANT], {})

    def of_session(self, record: CaseRecord) -> Mapping[str, str]:
        """Return column → value of an image's session."""
        rows = self.sessions.get(record.columns[PARTICIPANT], {})
        return rows.get(record.columns.get(SESSION, ""), {})

    def unknown_sessions(self, records: Iterable[CaseRecord]) -> list[str]:
        """Return participant and session of images whose sessions.tsv does not name the session."""
        found = set()
        for record in records:
            name, session = record.columns[PARTICIPANT], record.columns.get(SESSION)
            if session and self.sessions[name] and session not in self.sessions[name]:
                found.add(f"{name} {session}")
        return sorted(found)


def write_group_table(dataset: Path, folder: Path, participants: Sequence[str] = ()) -> GroupTable:
    """Write group_volumes.tsv and its data dictionary, from the records of an output folder.

    Args:
        dataset: the raw BIDS dataset; its participants.tsv and the sessions.tsv of its participants
            may be missing or incomplete.
        folder: the output folder.
        participants: labels, with or without `sub-`; empty for all.

    Raises:
        ConfigError: the folder holds no result of BIDS images, or a table cannot be read.
        WriteError: the table cannot be written.
    """
    wanted = {f"sub-{label.removeprefix('sub-')}" for label in participants}
    results = read_results(folder)
    records = [item for item in results.records if item.columns.get(PARTICIPANT)]
    if wanted:
        records = [item for item in records if item.columns[PARTICIPANT] in wanted]
    if not records:
        raise ConfigError(
            f"{folder}: holds no result of these participants; run the level `participant` first"
        )
    known = _Facts.of(dataset, records)
    table = _Columns.of(records, known)
    rows = [_row(record, known, table) for record in records]
    out = OutputFolder(folder)
    cells = [[row.get(column) for column in table.names] for row in rows]
    write_if_different(out, GROUP_TSV, table_text(table.names, cells))
    write_if_different(out, GROUP_JSON, json_text(table.dictionary(dataset, known.sessions)))
    with_image = {record.columns[PARTICIPANT] for record in records}
    listed = known.participants
    return GroupTable(
        path=folder / GROUP_TSV,
        rows=len(rows),
        unknown=sorted(with_image - set(listed)) if listed else [],
        without_image=[] if wanted else [name for name in listed if name not in with_image],
        unknown_sessions=known.unknown_sessions(records),
        in_both={
            name: column for name, column in table.sessions.items() if name in table.participants
        },
    )


def _volume_columns(records: Iterable[CaseRecord]) -> dict[str, str]:
    """Return name of a structure → name of its column, as BIDS wants it, such as left_caudate."""
    columns: dict[str, str] = {}
    for name in dict.fromkeys(name for record in records for name in record.volumes_mm3):
        column = re.sub(r"\W+", "_", name).strip("_").lower() or "structure"
        while column in columns.values():  # names that differ in a hyphen only
            column += "_"
        columns[name] = column
    return columns


def _row(record: CaseRecord, known: _Facts, table: _Columns) -> Row:
    """Return the row of an image: column → value."""
    parsed = parse_bids_name(record.case)
    return {
        PARTICIPANT: record.columns[PARTICIPANT],
        SESSION: record.columns.get(SESSION),
        **(parsed.entities if parsed is not None else {}),
        "image": record.case,
        "status": record.status,
        "warnings": WARNING_SEPARATOR.join(record.warnings),
        **{table.participants[name]: text for name, text in known.of_participant(record).items()},
        **{table.sessions[name]: text for name, text in known.of_session(record).items()},
        **{table.volumes[name]: f"{mm3:.3f}" for name, mm3 in record.volumes_mm3.items()},
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Columns:
    """The columns of the table.

    Attributes:
        facts: about the image.
        participants: name in participants.tsv → column.
        sessions: name in sessions.tsv → column.
        volumes: name of a structure → column.
    """

    facts: Sequence[str]
    participants: Mapping[str, str]
    sessions: Mapping[str, str]
    volumes: Mapping[str, str]

    @classmethod
    def of(cls, records: Sequence[CaseRecord], known: _Facts) -> _Columns:
        """Return the columns that some images, participants and sessions need."""
        used = {SESSION for record in records if record.columns.get(SESSION)}
        for record in records:
            parsed = parse_bids_name(record.case)
            used.update(parsed.entities if parsed is not None else ())
        first = [name for name in (PARTICIPANT, SESSION) if name == PARTICIPANT or name in used]
        entities = [name for name in ENTITY_NAMES.values() if name in used - {"sub", "ses"}]
        facts = [*first, *entities, "image", "status", "warnings"]
        volumes = _volume_columns(records)
        taken = {*facts, *volumes.values()}
        participants = _free_names(known.participants.values(), "participants_", taken)
        sessions = [row for rows in known.sessions.values() for row in rows.values()]
        return cls(
            facts=facts,
            participants=participants,
            sessions=_free_names(sessions, "sessions_", taken | set(participants.values())),
            volumes=volumes,
        )

    @property
    def names(self) -> list[str]:
        """All columns in order."""
        return [
            *self.facts,
            *self.participants.values(),
            *self.sessions.values(),
            *self.volumes.values(),
        ]

    def dictionary(self, dataset: Path, participants: Iterable[str]) -> dict[str, Any]:
        """Return the data dictionary: description and unit of each column.

        Args:
            dataset: the raw BIDS dataset.
            participants: those whose data dictionaries of sessions are read.
        """
        about = _read_dictionary(dataset / PARTICIPANTS_JSON)
        about_sessions: dict[str, Any] = {}
        for name in participants:
            about_sessions |= _read_dictionary(dataset / name / f"{name}_{SESSIONS_JSON}")
        # one for all participants, by the inheritance principle of BIDS
        about_sessions = _read_dictionary(dataset / SESSIONS_JSON) | about_sessions
        of_session = {"Description": f"As in the participant's {SESSIONS_TSV}."}
        entity = {
            name: {"Description": f"Entity {name} in the image's name."} for name in self.facts
        }
        source = {"Description": f"As in {PARTICIPANTS_TSV}."}
        return {
            **{name: FACTS.get(name, entity[name]) for name in self.facts},
            **{column: about.get(name, source) for name, column in self.participants.items()},
            **{
                column: about_sessions.get(name, of_session)
                for name, column in self.sessions.items()
            },
            **{
                column: {"Description": f"Volume: {name}.", "Units": "mm^3"}
                for name, column in self.volumes.items()
            },
        }


def _free_names(rows: Iterable[Mapping[str, str]], prefix: str, taken: set[str]) -> dict[str, str]:
    """Return the columns of some rows → names that are not taken, by a prefix where they are."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns: dict[str, str] = {}
    for name in names:
        column = name
        while column in taken or (column != name and column in names):
            column = f"{prefix}{column}"
        columns[name] = column
    return columns


def _read_dictionary(path: Path) -> dict[str, Any]:
    """Return a data dictionary; empty where there is none that can be read."""
    try:
        content = read_json(path)
    except ConfigError:
        return {}
    return content if isinstance(content, dict) else {}
