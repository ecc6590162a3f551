"""The command `volseg bids`: a BIDS App."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.batches import (
    BatchOptions,
    model_options,
    repetition_options,
    segment_batch,
    worker_options,
)
from pipeline.cli.options import DONE, Command, command, usage_errors
from pipeline.cli.reports import show_report
from pipeline.log import LOGGER

if TYPE_CHECKING:
    from pipeline.inference import CaseModel
    from pipeline.types import Case

LABEL = re.compile(r"(sub-|ses-)?[A-Za-z0-9+]+(,\S*)?")
LEVELS = ("participant", "group")
SUFFIX = "T1w"
SHOWN = 10  # names in a warning


class _BidsCommand(Command):
    """A command whose labels may follow an option one after the other, as BIDS Apps have it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the option before each further label: click gives an option one value each."""
        several = {name for option in self.params if option.multiple for name in option.opts}
        return super().parse_args(ctx, _repeated(args, several))


def _repeated(words: Sequence[str], several: set[str]) -> list[str]:
    """Return words with an option repeated before each of its values.

    >>> _repeated(["out", "--label", "01", "02", "-v"], {"--label"})
    ['out', '--label', '01', '--label', '02', '-v']
    """
    result: list[str] = []
    option = ""
    for word in words:
        if word.startswith("-"):
            option = word if word in several else ""
        elif option and result[-1] != option:
            if LABEL.fullmatch(word):
                result.append(option)
            else:
                option = ""
        result.append(word)
    return result


def _labels(values: Sequence[str]) -> tuple[str, ...]:
    return tuple(label for value in values for label in re.split(r"[,\s]+", value) if label)


@command(cls=_BidsCommand)
@click.argument("bids_dir", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@click.argument("level", metavar="participant|group", type=click.Choice(LEVELS))
@click.option(
    "--participant-label",
    "--participant_label",
    multiple=True,
    metavar="LABEL...",
    help="Labels of the participants, with or without sub-; all by default.",
)
@click.option(
    "--session-label",
    "--session_label",
    multiple=True,
    metavar="LABEL...",
    help="Labels of the sessions, with or without ses-; all by default.",
)
@click.option(
    "--bids-filter-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="JSON file that says which entities an image must have, as fMRIPrep reads it: "
    '{"t1w": {"session": "01", "acquisition": null}}.',
)
@click.option(
    "--suffix",
    metavar="SUFFIX",
    show_default="T1w, or the channels of the bundle if it has several",
    help="Suffix of the images to segment, such as T2w or FLAIR.",
)
@click.option(
    "--skip-bids-validation",
    "--skip_bids_validator",
    is_flag=True,
    help="Accepted because other BIDS Apps have it: volseg never runs the validator.",
)
@click.option(
    "--report",
    is_flag=True,
    help="Write the report of the output folder as well, as volseg report does.",
)
@model_options()
@worker_options()
@repetition_options()
def bids(
    bids_dir: Path,
    output: Path,
    level: str,
    participant_label: tuple[str, ...],
    session_label: tuple[str, ...],
    bids_filter_file: Path | None,
    suffix: str | None,
    skip_bids_validation: bool,
    report: bool,
    **given: Any,
) -> None:
    """Segment a BIDS dataset, and write BIDS derivatives.

    The level `participant` segments the images sub-LABEL/[ses-LABEL/]anat/…_T1w.nii.gz of
    BIDS_DIR. OUT gets label maps, their metadata and a table of volumes per image. The level
    `group` writes group_volumes.tsv: the volumes of all images, with the columns of
    participants.tsv and of each participant's sessions.tsv.
    """
    participants = _labels(participant_label)
    with usage_errors():
        from pipeline.io import bids_subjects

        bids_subjects(bids_dir)  # raises an error where there are none
        if level == "group":
            sys.exit(_group(bids_dir, output, participants))

        from pipeline.batch import BidsDerivatives, check_derivatives_folder, remove_orphans
        from pipeline.io import BidsQuery, find_bids_cases, read_bids_filter

        check_derivatives_folder(bids_dir, output)
        options, settings = BatchOptions.split(given)

        def find(model: CaseModel) -> list[Case]:
            suffixes = _suffixes(model, suffix)
            filters = {}
            if bids_filter_file is not None:
                filters = read_bids_filter(bids_filter_file, suffixes[0])
            query = BidsQuery(
                suffixes=suffixes,
                participants=participants,
                sessions=_labels(session_label),
                entities=filters,
            )
            return find_bids_cases(bids_dir, query)

        derivatives = BidsDerivatives(dataset=bids_dir, folder=output)
        status = segment_batch(find, output, options, settings, on_record=derivatives.add)
        if options.overwrite and not options.dry_run:
            remove_orphans(output)
        if report and not options.dry_run:
            show_report(output)
    sys.exit(status)


def _suffixes(model: CaseModel, suffix: str | None) -> tuple[str, ...]:
    """Return the suffix of the images of each channel."""
    from pipeline.errors import ConfigError

    channels = model.channels
    if len(channels) == 1:
        return (suffix or SUFFIX,)
    if suffix is not None:
        raise ConfigError(
            f"--suffix {suffix}: the bundle has the channels {', '.join(channels)}, whose names "
            "are the suffixes of its images"
        )
    return tuple(channels)


def _group(bids_dir: Path, output: Path, participants: tuple[str, ...]) -> int:
    """Write the table of a dataset, show what it lacks, and return the exit status."""
    from pipeline.batch import write_group_table

    table = write_group_table(bids_dir, output, participants)
    for text, names in (
        ("no row in participants.tsv", table.unknown),
        ("a row in participants.tsv, but no image here", table.without_image),
        ("no row in the participant's sessions.tsv", table.unknown_sessions),
    ):
        if names:
            more = f", … ({len(names)} in all)" if len(names) > SHOWN else ""
            LOGGER.warning("%s: %s%s", text, ", ".join(names[:SHOWN]), more)
    for name, column in table.in_both.items():
        LOGGER.warning(
            "%s is in participants.tsv and in sessions.tsv: the column %s holds the session's",
            name,
            column,
        )
    click.echo(f"{table.rows} images are in {table.path}", err=True)
    return DONE
