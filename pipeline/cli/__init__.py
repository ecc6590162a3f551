"""The command line: one module per group of commands. Only this package prints."""

from pipeline.cli.app import main
from pipeline.cli.progress import case_line, epoch_line, progress_bar, quiet

__all__ = ["case_line", "epoch_line", "main", "progress_bar", "quiet"]
