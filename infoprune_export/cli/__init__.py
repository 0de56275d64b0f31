"""The command line: options, verbs, what people see of results, exit codes. What the verbs do is elsewhere."""

from infoprune_export.cli.entry import main
from infoprune_export.cli.verbs import cli

__all__ = ["cli", "main"]
