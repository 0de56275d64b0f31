"""Runs the command line: libraries kept quiet, errors as one or two lines, exit codes."""

from __future__ import annotations

import logging
import os
import sys
import warnings

import click

from infoprune_export.cli.verbs import cli
from infoprune_export.errors import InfoPruneError


def _quieten(verbosity: int) -> None:
    """Keeps third-party chatter out of sight unless asked for; has to run before those libraries are imported."""
    if verbosity:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def main(args: list[str] | None = None) -> None:
    """Runs the command line and exits with the codes 0, 1, 2, 3, 4, 70 or 130 (see README)."""
    args = sys.argv[1:] if args is None else args
    verbosity = sum(a.count("v") for a in args if a.startswith("-v") and set(a[1:]) == {"v"}) + args.count("--verbose")
    _quieten(verbosity)
    try:
        cli.main(args, prog_name="infoprune-export", standalone_mode=False)
    except InfoPruneError as e:
        _fail(str(e), e.exit_code, verbosity)
    except click.UsageError as e:
        e.show()
        sys.exit(2)
    except click.ClickException as e:
        _fail(e.format_message(), 2, verbosity)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted" + "; the same command goes on from here" * _resumes(args), 130, 0)
    except MemoryError:
        _fail("out of memory\nuse a machine with more memory, or fewer --samples", 4, verbosity)
    except Exception as e:
        from infoprune_export.workspace import full_disk

        if full := full_disk(e, mend="make space and run the same command again"):
            _fail(str(full), full.exit_code, verbosity)
        if type(e).__name__ == "OutOfMemoryError":  # PyTorch's, which this module does not import
            _fail("out of memory on the GPU\nuse --device cpu, or a GPU with more memory", 4, verbosity)
        _fail(
            f"internal error, {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}\nrun again with -vv and report what it prints",
            70,
            verbosity,
        )


def _resumes(args: list[str]) -> bool:
    """Whether a command goes on where it was interrupted; `export` may be left out."""
    verb = args[0] if args and args[0] in cli.commands else "export"
    return verb in ("export", "plan") and not {"--dry-run", "--no-resume"}.intersection(args)


def _fail(message: str, code: int, verbosity: int) -> None:
    if verbosity >= 2:
        import traceback

        traceback.print_exc()
    click.secho("error: ", err=True, fg="red", bold=True, nl=False)
    click.echo(message, err=True)
    sys.exit(code)
