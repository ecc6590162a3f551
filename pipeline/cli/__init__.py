"""The command line; only this package prints.

Modules:
    app         the command `volseg` and its sub-commands
    segment, bundles, training, evaluation   the commands, by group
    options     what all commands share: verbosity, common options, exit statuses
    reports     the commands report and view
    progress    what is shown while a command works
"""

from pipeline.cli.app import main
from pipeline.cli.options import show_log
from pipeline.cli.progress import case_line, epoch_line, progress_bar

__all__ = ["case_line", "epoch_line", "main", "progress_bar", "show_log"]
