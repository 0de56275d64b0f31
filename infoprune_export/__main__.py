"""`python -m infoprune_export`."""

from infoprune_export.cli import main

main()
