"""The command `volseg` and its sub-commands; slow imports happen inside a command."""

from __future__ import annotations

import click

from pipeline.cli.bids import bids
from pipeline.cli.bundles import bundle_group, export, import_command
from pipeline.cli.evaluation import compare, evaluate
from pipeline.cli.reports import report, view
from pipeline.cli.segment import segment, tables
from pipeline.cli.training import crossval, plan, train
from pipeline.processes import ensure_user_name, without_working_folder


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="volseg")
@click.pass_context
def main(context: click.Context) -> None:
    """Segment MRI volumes with 2D and 3D U-Nets, as MONAI bundles.

    Exit status: 0 all done, 1 at least one case failed (the others are written), 2 the command or
    its configuration is wrong, 130 and 143 interrupted.
    """
    # until the command ends, so that a program that calls it keeps its own environment
    context.with_resource(without_working_folder())
    ensure_user_name()


COMMANDS = (
    segment,
    bids,
    tables,
    report,
    view,
    plan,
    train,
    evaluate,
    crossval,
    compare,
    bundle_group,
    import_command,
    export,
)
for _command in COMMANDS:
    main.add_command(_command)
