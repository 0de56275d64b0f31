"""What results depend on, as short hashes: files, and what Python code does."""

from __future__ import annotations

import ast
import hashlib
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def digest(parts: object) -> str:
    """A short hash of anything that prints the same when it is the same."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def code_version(files: Iterable[Path]) -> str:
    """A hash of what Python files do; comments, docstrings and layout do not count, nor does Python's own version."""
    trees = []
    for path in sorted(files):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node, clean=False):
                node.body = node.body[1:] or [ast.Pass()]
        trees.append((path.name, ast.unparse(tree)))
    return digest(trees)


def with_imports(files: Iterable[Path], root: Path = ROOT) -> set[Path]:
    """Files and all that they import, directly or not, of the packages under a root.

    Args:
        files: To begin with.
        root: Holds the packages.
    """
    found: set[Path] = set()
    waiting = list(files)
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += [p for name in _imports(path) if (p := root.joinpath(*name.split(".")).with_suffix(".py")).is_file()]
    return found


def _imports(path: Path) -> Iterator[str]:
    """Names of modules that a file imports, wherever in it; of `from package import name`, both readings."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def commit() -> str:
    """The commit, `+` where the working tree differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
