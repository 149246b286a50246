"""Makes a disk full, a file read-only or a database locked or damaged, for real, and undoes it."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NOBODY = 65_534


@contextmanager
def small_disk(size_kib: int) -> Iterator[Path]:
    """A file system of its own with so much room. Raises PermissionError where mounting is not allowed."""
    folder = Path(tempfile.mkdtemp(prefix="paycore-disk-"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode != 0:
        folder.rmdir()
        raise PermissionError(mounted.stderr.decode())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()


def can_mount() -> bool:
    """Whether this process may mount a file system."""
    try:
        with small_disk(64):
            return True
    except (PermissionError, FileNotFoundError):
        return False


def fill(folder: Path) -> Path:
    """Take all the room that is left on a disk; return the file that takes it."""
    filler = folder / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4_096)
    return filler


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter: the test runner's own are closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="paycore-open-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Nobody may write a file nor into its folder, which must be an ``open_folder``.

    No permission binds root: a root process acts as nobody until the block ends.
    """
    modes = {one: one.stat().st_mode for one in (path, path.parent)}
    path.chmod(0o444)
    path.parent.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(_NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        for one, mode in modes.items():
            one.chmod(mode)


@contextmanager
def held_by_another_process(path: Path, *statements: str) -> Iterator[None]:
    """Another process has run the statements on the database and stays as it is until the block ends."""
    program = (
        "import sqlite3, sys\n"
        "connection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "for statement in sys.argv[2:]: connection.execute(statement).fetchall()\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
        "connection.close()\n"
    )
    command = [sys.executable, "-c", program, str(path), *statements]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield


def checkpoint(path: Path) -> None:
    """Bring everything committed from the log into the file itself."""
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
    finally:
        connection.close()


def damage(path: Path) -> bytes:
    """Overwrite everything behind the file's header; return what stood in the file."""
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\xa5" * (len(content) - 100))
    return content


def mend(path: Path, content: bytes) -> None:
    """Write back what ``damage`` returned, in place."""
    with path.open("r+b") as file:
        file.write(content)
