"""The table of a whole BIDS dataset: one row per image, with what is known of its participant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    parse_bids_name,
    read_json,
    read_participants,
)

PARTICIPANT, SESSION = "participant_id", "session_id"
PARTICIPANTS_JSON = "participants.json"
FACTS = {
    PARTICIPANT: {"Description": "Label of the participant, with sub-."},
    SESSION: {"Description": "Label of the session, with ses-."},
    "image": {"Description": "Path of the image in the raw dataset, without its extension."},
    "status": {"Description": "What became of the image; failed and quarantined have no volumes."},
    "warnings": {"Description": "Reasons to look at the segmentation before its volumes are used."},
}
Row = dict[str, Any]
Participants = Mapping[str, Mapping[str, str]]  # participant → column → value


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupTable:
    """The table of a dataset.

    Attributes:
        path: its file.
        rows: number of images.
        unknown: participants with images who are not in participants.tsv.
        without_image: participants in participants.tsv without an image in the results.
    """

    path: Path
    rows: int
    unknown: Sequence[str]
    without_image: Sequence[str]


def write_group_table(dataset: Path, folder: Path, participants: Sequence[str] = ()) -> GroupTable:
    """Write group_volumes.tsv and its data dictionary, from the records of an output folder.

    Args:
        dataset: the raw BIDS dataset; its participants.tsv may be missing or incomplete.
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
    known = read_participants(dataset)
    table = _Columns.of(records, known)
    rows = [_row(record, known.get(record.columns[PARTICIPANT], {}), table) for record in records]
    out = OutputFolder(folder)
    cells = [[row.get(column) for column in table.names] for row in rows]
    write_if_different(out, GROUP_TSV, table_text(table.names, cells))
    write_if_different(out, GROUP_JSON, json_text(table.dictionary(dataset)))
    with_image = {record.columns[PARTICIPANT] for record in records}
    return GroupTable(
        path=folder / GROUP_TSV,
        rows=len(rows),
        unknown=sorted(with_image - set(known)) if known else [],
        without_image=[] if wanted else [name for name in known if name not in with_image],
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


def _row(record: CaseRecord, about: Mapping[str, str], table: _Columns) -> Row:
    """Return the row of an image: column → value.

    Args:
        record: of the image.
        about: its participant's row of participants.tsv; empty for none.
        table: the columns.
    """
    parsed = parse_bids_name(record.case)
    return {
        PARTICIPANT: record.columns[PARTICIPANT],
        SESSION: record.columns.get(SESSION),
        **(parsed.entities if parsed is not None else {}),
        "image": record.case,
        "status": record.status,
        "warnings": WARNING_SEPARATOR.join(record.warnings),
        **{table.participants[name]: text for name, text in about.items()},
        **{table.volumes[name]: f"{mm3:.3f}" for name, mm3 in record.volumes_mm3.items()},
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Columns:
    """The columns of the table.

    Attributes:
        facts: about the image.
        participants: name in participants.tsv → column.
        volumes: name of a structure → column.
    """

    facts: Sequence[str]
    participants: Mapping[str, str]
    volumes: Mapping[str, str]

    @classmethod
    def of(cls, records: Sequence[CaseRecord], known: Participants) -> _Columns:
        """Return the columns that some images and participants need."""
        used = {SESSION for record in records if record.columns.get(SESSION)}
        for record in records:
            parsed = parse_bids_name(record.case)
            used.update(parsed.entities if parsed is not None else ())
        first = [name for name in (PARTICIPANT, SESSION) if name == PARTICIPANT or name in used]
        entities = [name for name in ENTITY_NAMES.values() if name in used - {"sub", "ses"}]
        facts = [*first, *entities, "image", "status", "warnings"]
        volumes = _volume_columns(records)
        taken = {*facts, *volumes.values()}
        names = dict.fromkeys(name for row in known.values() for name in row)
        return cls(
            facts=facts,
            participants={
                name: f"participants_{name}" if name in taken else name for name in names
            },
            volumes=volumes,
        )

    @property
    def names(self) -> list[str]:
        """All columns in order."""
        return [*self.facts, *self.participants.values(), *self.volumes.values()]

    def dictionary(self, dataset: Path) -> dict[str, Any]:
        """Return the data dictionary: description and unit of each column."""
        try:
            content = read_json(dataset / PARTICIPANTS_JSON)
        except ConfigError:
            content = {}
        about = content if isinstance(content, dict) else {}
        entity = {
            name: {"Description": f"Entity {name} in the image's name."} for name in self.facts
        }
        source = {"Description": f"As in {PARTICIPANTS_TSV}."}
        return {
            **{name: FACTS.get(name, entity[name]) for name in self.facts},
            **{column: about.get(name, source) for name, column in self.participants.items()},
            **{
                column: {"Description": f"Volume: {name}.", "Units": "mm^3"}
                for name, column in self.volumes.items()
            },
        }
