"""Holds the Dockerfile to the tree: no image is built here, but what it copies, runs and promises is there."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Stage:
    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def values(self, instruction: str) -> list[str]:
        return [value for name, value in self.steps if name == instruction]


def read_dockerfile() -> tuple[dict[str, str], dict[str, Stage]]:
    """Global build arguments with their defaults, and stages by name."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    stage = None
    for line in text.replace("\\\n", " ").splitlines():
        instruction, _, value = line.strip().partition(" ")
        if instruction == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", value).groups()
            stage = stages[name] = Stage(name, base)
        elif stage is None and instruction == "ARG":
            name, _, default = value.partition("=")
            arguments[name] = default
        elif instruction:
            stage.steps.append((instruction, " ".join(value.split())))
    return arguments, stages


ARGUMENTS, STAGES = read_dockerfile()
IMAGES = ("cpu", "tensorrt", "runtime")


def copies(stage: Stage) -> list[tuple[str | None, list[str], str]]:
    """Stage copied from (None: the tree), sources and target of every COPY."""
    found = []
    for value in stage.values("COPY"):
        words = shlex.split(value)
        origin = next((w.removeprefix("--from=") for w in words if w.startswith("--from=")), None)
        *sources, target = [w for w in words if not w.startswith("--")]
        found.append((origin, sources, target))
    return found


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path of the tree from the builder; the last matching line decides."""
    result = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#") and any(fnmatch.fnmatch(part, pattern) for part in (path, *map(str, Path(path).parents))):
            result = not line.startswith("!")
    return result


def test_the_stages_are_those_that_the_page_describes():
    assert set(STAGES) == {"source", "cpu", "tensorrt", "runtime-install", "runtime"}
    page = (ROOT / "docs" / "docker.md").read_text()
    assert all(f"`{name}`" in page for name in STAGES)
    assert set(re.findall(r"--target (cpu|tensorrt|runtime\S*) ", page)) <= set(STAGES)
    assert list(STAGES)[-1] == "runtime", "the page calls it the default"


def test_every_build_argument_is_described():
    page = (ROOT / "docs" / "docker.md").read_text()
    declared = {*ARGUMENTS, *(v.partition("=")[0] for s in STAGES.values() for v in s.values("ARG"))}
    assert {name for name in declared if f"`{name}`" not in page} == set()
    for name, default in ARGUMENTS.items():
        assert f"`{default}`" in page, f"{name} has another default on the page"


def test_bases_are_pinned_and_given_by_argument():
    for stage in STAGES.values():
        name = re.fullmatch(r"\$\{(\w+)\}", stage.base)
        assert name and name[1] in ARGUMENTS, f"{stage.name}: its base is no build argument"
    for default in ARGUMENTS.values():
        tag = default.rpartition(":")[2]
        assert re.search(r"\d+\.\d+", tag), f"{default} is not pinned to a release"


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_what_is_copied_exists_and_reaches_the_builder(stage):
    for origin, sources, _ in copies(stage):
        if origin is not None:
            assert origin in STAGES
            continue
        for source in sources:
            assert (ROOT / source).exists(), f"COPY {source}: no such file"
            assert not ignored(source), f"COPY {source}: .dockerignore leaves it out"


def test_nothing_else_reaches_the_builder():
    assert all(ignored(path) for path in (".git", ".venv", "build", "tests", "tools/train_tiny_llava.py", "recipes/__pycache__"))


def test_the_package_can_be_built_from_what_is_copied():
    """pyproject.toml names files; the wheel needs them all."""
    copied = {source for _, sources, _ in copies(STAGES["source"]) for source in sources}
    text = (ROOT / "pyproject.toml").read_text()
    needed = {
        *re.findall(r'^readme = "(\S+)"', text, re.M),
        *re.findall(r'license-files = \["(\S+)"\]', text),
        "infoprune_export",
        "recipes",
    }
    assert needed <= copied


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_scripts_that_are_run_are_there_and_executable(stage):
    """Follows each script back through the COPY lines to its file in the tree."""
    for command in stage.values("RUN"):
        for script in re.findall(r"(/\S+\.sh)\b", command):
            source = ROOT / "tools" / Path(script).name
            assert os.access(source, os.X_OK), f"{source} is not an executable file"
            own = [target for origin, sources, target in copies(stage) if origin is None]
            through_source = any(origin == "source" and script.startswith(f"{target}/tools/") for origin, _, target in copies(stage))
            assert script in own or through_source, f"{script} is not in the stage {stage.name}"


@pytest.mark.parametrize("name", ["install.sh", "smoke.sh"])
def test_make_runs_the_scripts_that_the_images_run(name):
    assert f"tools/{name}" in (ROOT / "Makefile").read_text()
    assert any(name in command for stage in STAGES.values() for command in stage.values("RUN"))
    assert subprocess.run(["bash", "-n", ROOT / "tools" / name]).returncode == 0


def test_installations_name_extras_that_exist():
    extras = set(re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1], re.M))
    for stage in STAGES.values():
        for command in stage.values("RUN"):
            for asked in re.findall(r"install\.sh \S+ ([\w,-]+)", command):
                assert set(asked.split(",")) <= extras


@pytest.mark.parametrize("name", IMAGES)
def test_images_do_not_run_as_root(name):
    users = STAGES[name].values("USER")
    assert users and users[-1] == "infoprune"
    assert any("useradd" in command and users[-1] in command for command in STAGES[name].values("RUN"))
    after = [instruction for instruction, _ in STAGES[name].steps]
    assert "RUN" not in after[after.index("USER") :]


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_smoked_when_built(name):
    assert any("smoke.sh" in command for command in STAGES[name].values("RUN"))
    assert STAGES[name].values("ENTRYPOINT") == ['["infoprune-export"]']


def test_the_runtime_image_has_a_health_check_and_no_pytorch():
    runtime, install = STAGES["runtime"], STAGES["runtime-install"]
    assert runtime.values("HEALTHCHECK")
    assert {origin for origin, _, _ in copies(runtime)} == {"runtime-install", None}
    defaults = dict(value.split("=") for value in install.values("ARG"))
    pyproject = (ROOT / "pyproject.toml").read_text()
    core, extras = pyproject.split("[project.optional-dependencies]")
    assert "torch" not in core.split("dependencies = [")[1].split("]")[0]
    for extra in defaults["RUNTIME_EXTRAS"].split(","):
        assert "torch" not in re.search(rf"^{extra} = \[(.*?)\]", extras, re.M | re.S)[1]


def test_images_meet_no_secrets():
    text = (ROOT / "Dockerfile").read_text()
    assert not re.search(r"(TOKEN|PASSWORD|SECRET)", text)
