"""What keeps a server from starting: one line that says what to do, and an exit code."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from paycore.store.schema import migrate
from tests.support.postgres import connected, fresh_postgres
from tests.support.server import PAYCORE, ServerProcess, check_health, clean_environment

SECONDS = 60


def serve(db: str, *flags: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Run a server that must refuse; return its exit code and what it said on standard error."""
    listen = [] if "--listen" in flags else ["--listen", "127.0.0.1:0"]
    metrics = [] if "--metrics-listen" in flags else ["--metrics-listen", "127.0.0.1:0"]
    ended = subprocess.run(
        [str(PAYCORE), "serve", "--db", db, *listen, *metrics, *flags],
        env=clean_environment(env),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        stdin=subprocess.DEVNULL,
    )
    assert ended.stdout == ""
    return ended.returncode, ended.stderr


def refusal(db: str, *flags: str) -> str:
    code, said = serve(db, *flags)
    assert code == 1
    lines = said.splitlines()
    assert len(lines) == 1, said
    return lines[0]


@pytest.fixture
def db_path(tmp_path: Path) -> Path:
    path = tmp_path / "paycore.db"
    migrate(f"sqlite:///{path}")
    return path


def test_serve_without_a_database_names_migrate(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'none.db'}"
    assert f"paycore migrate --db {url}" in refusal(url)


def test_serve_on_an_older_database_names_migrate(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    sqlite3.connect(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE something (x)")
        connection.commit()
    line = refusal(f"sqlite:///{path}")
    assert "version none" in line
    assert "paycore migrate --db" in line


def test_serve_on_a_newer_database_names_the_version(db_path: Path) -> None:
    with closing(sqlite3.connect(db_path)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    line = refusal(f"sqlite:///{db_path}")
    assert "9999 is newer than this paycore" in line


def test_serve_on_a_corrupt_database_says_so(tmp_path: Path) -> None:
    path = tmp_path / "corrupt.db"
    path.write_bytes(b"this is no database " * 1_000)
    assert "restore it from a backup" in refusal(f"sqlite:///{path}")


def test_serve_on_a_truncated_database_says_so(db_path: Path) -> None:
    data = bytearray(db_path.read_bytes())
    data[4_096:] = b"\xff" * (len(data) - 4_096)
    db_path.write_bytes(data)
    assert "restore it from a backup" in refusal(f"sqlite:///{db_path}")


@pytest.mark.parametrize("option", ["synchronous=NORMAL", "journal_mode=DELETE"])
def test_serve_with_weak_durability_is_refused(db_path: Path, option: str) -> None:
    assert option in refusal(f"sqlite:///{db_path}?{option}")


@pytest.mark.parametrize("flag", ["--listen", "--metrics-listen"])
def test_serve_outside_loopback_is_refused_and_says_why(db_path: Path, flag: str) -> None:
    line = refusal(f"sqlite:///{db_path}", flag, "0.0.0.0:0")
    assert line.startswith(f"PAYCORE_{flag.strip('-').replace('-', '_').upper()} 0.0.0.0:0:")
    assert "no access control" in line


@pytest.mark.parametrize("flag", ["--listen", "--metrics-listen"])
def test_serve_on_a_port_in_use_says_what_to_do(tmp_path: Path, db_path: Path, flag: str) -> None:
    with ServerProcess(tmp_path / "first.db") as first:
        address = first.address if flag == "--listen" else first.metrics_address
        line = refusal(f"sqlite:///{db_path}", flag, address)
        assert address in line
        assert "Address already in use" in line
        assert "port 0" in line


def test_serve_on_a_unix_socket_in_use_leaves_it_to_its_server(tmp_path: Path, db_path: Path) -> None:
    address = f"unix:{tmp_path / 's'}"
    with ServerProcess(tmp_path / "first.db", arguments=["--listen", address]) as first:
        assert first.address == address
        assert "Address already in use" in refusal(f"sqlite:///{db_path}", "--listen", address)
        assert check_health(first.address) == "SERVING"
        first.kill()
        # The socket's file is still there; nobody listens on it.
        first.restart()


def test_serve_on_a_database_that_another_process_holds_says_so(db_path: Path) -> None:
    with closing(sqlite3.connect(db_path, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        line = refusal(f"sqlite:///{db_path}")
    assert "try again" in line


def test_serve_on_a_postgresql_that_is_held_says_so_without_the_password() -> None:
    url = fresh_postgres()
    with connected(url, autocommit=False) as holder:
        holder.execute("LOCK TABLE writer IN ACCESS EXCLUSIVE MODE")
        code, said = serve(url.replace("paycore@", "paycore:s3cret@"), "--workers", "2")
    assert code == 1
    assert "try again" in said.splitlines()[-1]
    assert "s3cret" not in said


def test_serve_with_a_wrong_setting_is_wrong_usage(db_path: Path) -> None:
    code, said = serve(f"sqlite:///{db_path}", env={"PAYCORE_QUEUE_LIMIT": "none"})
    assert code == 2
    assert said.startswith("PAYCORE_QUEUE_LIMIT: ")
    assert len(said.splitlines()) == 1


def test_ready_file_holds_the_real_addresses_and_goes_with_the_server(tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    server = ServerProcess(tmp_path / "paycore.db", arguments=["--ready-file", str(ready)])
    # The helper waits for its own ready file, which the later flag replaces.
    server.launch()
    try:
        while not ready.exists():
            assert server.process.poll() is None, server.log()
        said = json.loads(ready.read_text())
        assert set(said) == {"address", "metrics_address", "pid"}
        assert said["pid"] == server.pid
        assert not said["address"].endswith(":0")
        os.kill(said["pid"], 15)
        assert server.wait() == 0
        assert not ready.exists()
    finally:
        server.kill()


@pytest.mark.parametrize("listen", ["localhost:0", "127.8.9.10:0", "[::1]:0"])
def test_serve_on_loopback_by_any_name_answers(tmp_path: Path, listen: str) -> None:
    with ServerProcess(tmp_path / "paycore.db", arguments=["--listen", listen]) as server:
        assert check_health(server.address) == "SERVING"
