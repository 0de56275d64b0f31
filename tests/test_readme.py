"""Every command that the documentation shows is one that the program understands."""

import re
import shlex
from pathlib import Path

import pytest

from infoprune_export.cli import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(pattern: str) -> list[str]:
    return [m.group(1).strip() for page in PAGES for m in re.finditer(pattern, page.read_text(), re.MULTILINE)]


@pytest.mark.parametrize("line", commands(r"^\$ (?:\S*/)?infoprune-export (.*?)(?:\s+#.*)?$"))
def test_commands_parse(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = shlex.split(line)
    for path in (a for a in args if a.endswith("plan.json")):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("{}")
    group = cli.make_context("infoprune-export", args)
    name, verb, rest = cli.resolve_command(group, [*group._protected_args, *group.args])
    verb.make_context(name, rest, parent=group)


@pytest.mark.parametrize("target", commands(r"^\$ make ([a-z-]+)"))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_there_are_commands_to_check():
    assert len(commands(r"^\$ (?:\S*/)?infoprune-export (.*)$")) > 10
