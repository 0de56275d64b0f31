"""Where a bundle grows: a locked, resumable folder beside it, renamed into place when whole.

A killed run leaves the old bundle, if there was one, and a work folder keyed by the run's inputs; the same
command again goes on after the last finished stage. The lock is the kernel's (`flock`): it dies with its owner.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from infoprune_export.bundle import MANIFEST
from infoprune_export.errors import FullDisk, InfoPruneError, InputError, NotEnough


class Workspace:
    """The work folder of one output directory, to be used in a `with` block.

    Attributes:
        folder: All that is written before the bundle is put in place.
        path: Where the bundle grows.
        scratch: For what a later stage or the next run needs and the bundle does not hold.

    Args:
        out: The bundle's directory.
        key: Names the run's inputs; another key never resumes this one's work.
        resume: Go on where an earlier run with the same key stopped.
        also: Other directories that the run writes below.

    Raises:
        InputError: `out` is something else than a bundle or cannot be written, or another run is writing it.
    """

    def __init__(self, out: Path, key: str, resume: bool = True, also: Sequence[Path] = ()):
        check_output(out)
        out = self.out = out.resolve()  # a link stays one, and what it points to is replaced
        self.key, self.resume, self.also = key, resume, also
        self.folder = beside(out, f"work-{key[:16]}")
        self.path, self.scratch, self._stages = (self.folder / name for name in ("bundle", "scratch", "stages"))
        self._old, self._lock_path = beside(out, "old"), beside(out, "lock")
        self._lock: IO[str] | None = None
        self._made: list[Path] = []

    def __enter__(self) -> Workspace:
        missing = [p for p in (self.out.parent, *self.out.parent.parents) if not p.exists()]
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._made = missing
            self._lock = _lock(self._lock_path, self.out)
        except OSError as e:
            raise InputError(f"cannot be written ({e.strerror})", where=self.out.parent, mend="choose another --out") from None
        # A run killed between the two renames of `finish` has put the old bundle aside: put it back.
        if self._old.exists():
            if self.out.exists():
                shutil.rmtree(self._old)
            else:
                self._old.rename(self.out)
        if not self.resume and self.folder.exists():
            shutil.rmtree(self.folder)
        for directory in (self.path, self.scratch, self._stages):
            directory.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        refused = isinstance(error, InfoPruneError) and not any(self._stages.glob("*"))
        if refused:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            self._lock_path.unlink(missing_ok=True)
            self._lock.close()
        if refused:
            _remove_empty(self._made)
        if full := full_disk(error, self.out.parent, *self.also):
            raise full from error

    def stage(self, name: str, work: Callable[[], None]) -> bool:
        """Runs a stage unless an earlier run has finished it.

        Args:
            name: Its name.
            work: Writes below `path` and `scratch`; may find half-written files of its own from a killed run.

        Returns:
            Whether it ran now.
        """
        marker = self._stages / name
        if marker.exists():
            return False
        work()
        _sync_tree(self.folder)
        marker.touch()
        return True

    def finish(self, alone: bool = False) -> None:
        """Puts the bundle in place and removes what this run left, and what others left that made a bundle of other inputs.

        Args:
            alone: Leave that of others: they may go on.
        """
        _sync_tree(self.path)
        if self.out.exists():
            self.out.rename(self._old)
        self.path.rename(self.out)
        shutil.rmtree(self._old, ignore_errors=True)
        others = () if alone else self.out.parent.glob(f"{glob.escape(beside(self.out, 'work-').name)}*")
        for left in (self.folder, *others):
            shutil.rmtree(left, ignore_errors=True)


def _remove_empty(directories: list[Path]) -> None:
    """Removes directories, the innermost first, up to one that holds something."""
    for directory in directories:
        try:
            directory.rmdir()
        except OSError:
            break


def check_output(out: Path) -> None:
    """Refuses to write where something else than a bundle is.

    Raises:
        InputError: `out` is a file, or a directory with other contents than a bundle's.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise InputError("exists and is not a bundle; it is never overwritten", where=out, mend="choose another --out")
    if out.exists() and not out.is_dir():
        raise InputError("is a file", where=out, mend="choose another --out")
    _check_writable(out.absolute().parent)


def _check_writable(directory: Path, option: str = "--out") -> None:
    """Refuses a directory, there or to be made, in which nothing can be made."""
    parent = nearest(directory)
    read_only = parent.is_dir() and os.statvfs(parent).f_blocks == 0  # file systems without blocks, such as /proc, hold no files
    if not parent.is_dir() or read_only or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError("cannot be written", where=parent, mend=f"choose another {option}")


def check_disk(out: Path, needed: int) -> None:
    """Stops before work that would not fit.

    Raises:
        NotEnough: fewer free bytes than needed on the disk of `out`.
    """
    parent = nearest(out.absolute().parent)
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise NotEnough(
            f"the bundle needs about {needed / 2**30:.1f} GiB of disk, {free / 2**30:.1f} GiB are free",
            where=parent,
            mend="make space, choose another --out, or leave the original out with --no-original",
        )


def beside(out: Path, name: str) -> Path:
    """A hidden path next to an output."""
    out = out.absolute()
    return out.with_name(f".{out.name}.{name}")


def tree_bytes(root: Path) -> int:
    """Bytes of all files below a directory; 0 where there is none."""
    total = 0
    for path in root.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size * path.is_file()
    return total


@contextmanager
def side_folder(
    out: Path,
    name: str,
    resume: bool = True,
    key: str | None = None,
    also: Sequence[Path] = (),
    option: str = "--out",
) -> Iterator[Path]:
    """A locked folder beside an output, for what a run makes and does not keep.

    It is removed at the end, and when the run is refused; a run that was killed, interrupted or out of disk leaves it to the same command.

    Args:
        out: The run's output.
        name: What the folder is for.
        resume: Take over what an earlier run left in it.
        key: Names what its contents depend on; those of another key are removed. None: whoever uses it looks after that.
        also: Other directories that the run writes below.
        option: Of the command line, which says where it is.

    Raises:
        InputError: another run has it, or it cannot be made.
        FullDisk: what was made is kept.
    """
    out = out.absolute()
    _check_writable(out.parent, option)
    folder, lock_path = beside(out, name), beside(out, f"{name}.lock")
    made = [p for p in (out.parent, *out.parent.parents) if not p.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(lock_path, out)
    except OSError as e:
        raise InputError(f"cannot be written ({e.strerror})", where=out.parent, mend=f"choose another {option}") from None
    done = False
    try:
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        if key is not None and not (folder / key).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            (folder / key).touch()
        yield folder
        done = True
    except FullDisk:
        raise
    except InfoPruneError:
        done = True
        raise
    except Exception as e:
        if full := full_disk(e, out.parent, *also):
            raise full from e
        raise
    finally:
        if done:
            shutil.rmtree(folder, ignore_errors=True)
        lock_path.unlink(missing_ok=True)
        lock.close()
        if done:
            _remove_empty(made)


FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
GOES_ON = "make space and run the same command again: it goes on from here"


def is_full_disk(error: BaseException) -> bool:
    """Whether an error is the disk's: Python's own, or one that a library written in another language tells as text."""
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return True
    return any(f"os error {code})" in str(error) or os.strerror(code) in str(error) for code in FULL_DISK)


def full_disk(error: BaseException | None, *places: Path, mend: str = GOES_ON) -> FullDisk | None:
    """What a user is told of an error that is the disk's; None of any other.

    Args:
        error: Raised while files were written.
        places: Directories that were written below; the one with the least space is named where the error names no file.
        mend: What to do about it.
    """
    if error is None or isinstance(error, InfoPruneError) or not is_full_disk(error):
        return None
    fullest = min(map(nearest, places), key=lambda p: shutil.disk_usage(p).free, default=None)
    return FullDisk(
        "the disk is full, or a file may not grow further",
        where=getattr(error, "filename", None) or fullest,
        mend=mend,
    )


def nearest(path: Path) -> Path:
    """A path, or the nearest directory above it that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def _lock(path: Path, out: Path) -> IO[str]:
    while True:
        handle = open(path, "w")  # noqa: SIM115 (kept open for as long as the lock is held)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            raise InputError("another run is writing this bundle", where=out, mend="wait for it, or choose another --out") from None
        # The owner before us may have unlinked the file between our open and our lock.
        try:
            if os.fstat(handle.fileno()).st_ino == path.stat().st_ino:
                return handle
        except FileNotFoundError:
            pass
        handle.close()


def _sync_tree(root: Path) -> None:
    """Makes files durable, so that a stage marked done is there after a power cut too."""
    for path in root.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
