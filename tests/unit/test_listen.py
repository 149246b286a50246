"""Where a server may listen."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from paycore.rpc.listen import ListenRefusedError, TcpAddress, UnixAddress, check_free, hold_shared, parse_listen

ALLOWED = [
    ("127.0.0.1:50051", TcpAddress("127.0.0.1", 50_051)),
    ("127.255.1.2:0", TcpAddress("127.255.1.2", 0)),
    ("localhost:65535", TcpAddress("127.0.0.1", 65_535)),
    ("[::1]:1", TcpAddress("::1", 1)),
    ("::1:1", TcpAddress("::1", 1)),
    ("unix:/run/paycore.sock", UnixAddress(Path("/run/paycore.sock"))),
    ("unix:paycore.sock", UnixAddress(Path("paycore.sock"))),
]


@pytest.mark.parametrize(("text", "address"), ALLOWED)
def test_address_on_loopback_is_read(text: str, address: TcpAddress | UnixAddress) -> None:
    assert parse_listen("PAYCORE_LISTEN", text) == address


@pytest.mark.parametrize("address", [TcpAddress("127.0.0.1", 5), TcpAddress("::1", 5), UnixAddress(Path("/s"))])
def test_address_is_written_as_it_is_read(address: TcpAddress | UnixAddress) -> None:
    assert parse_listen("PAYCORE_LISTEN", str(address)) == address


NOT_LOOPBACK = [
    "0.0.0.0:1",
    "[::]:1",
    "*:1",
    "10.0.0.1:1",
    "192.168.1.1:1",
    "169.254.1.1:1",
    "[fe80::1]:1",
    "[::ffff:10.0.0.1]:1",
    "example.com:1",
    "localhost.example.com:1",
    "127.1:1",
    "2130706433:1",
    "127.0.0.1 :1",
]


@pytest.mark.parametrize("text", NOT_LOOPBACK)
def test_address_outside_loopback_is_refused_and_says_why(text: str) -> None:
    with pytest.raises(ListenRefusedError, match="no access control") as caught:
        parse_listen("PAYCORE_LISTEN", text)
    assert str(caught.value).startswith(f"PAYCORE_LISTEN {text}: ")


NONSENSE = ["", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", ":1", "127.0.0.1:+5", "127.0.0.1:１", "127.0.0.1:1_0"]


@pytest.mark.parametrize("text", [*NONSENSE, "unix:", f"unix:/{'x' * 107}"])
def test_text_that_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ListenRefusedError, match=r"PAYCORE_LISTEN.* must "):
        parse_listen("PAYCORE_LISTEN", text)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_port_that_is_listened_on_is_not_free(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        socket.create_server((host, 0), family=family) as listener,
        pytest.raises(ListenRefusedError, match=r"Address already in use.*port 0"),
    ):
        check_free("PAYCORE_LISTEN", TcpAddress(host, listener.getsockname()[1]))
    check_free("PAYCORE_LISTEN", TcpAddress(host, 0))


def listening(host: str, port: int, *, shared: bool) -> socket.socket:
    """Listen as gRPC does."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
        listener.bind((host, port))
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_held_port_is_shared_by_those_who_say_so_and_by_nobody_else(host: str) -> None:
    with hold_shared("PAYCORE_LISTEN", TcpAddress(host, 0)) as holder:
        address = TcpAddress(host, holder.getsockname()[1])
        check_taken(address)
        with pytest.raises(OSError, match="in use"):
            listening(host, address.port, shared=False)
        with listening(host, address.port, shared=True), listening(host, address.port, shared=True):
            check_taken(address)
        check_taken(address)
    check_free("PAYCORE_LISTEN", address)


def check_taken(address: TcpAddress) -> None:
    for take in (check_free, hold_shared):
        with pytest.raises(ListenRefusedError, match="Address already in use"):
            take("PAYCORE_LISTEN", address)


@pytest.mark.parametrize("shared", [False, True])
def test_port_where_only_old_connections_linger_is_held_as_strictly(shared: bool) -> None:
    with listening("127.0.0.1", 0, shared=shared) as listener:
        address = TcpAddress(*listener.getsockname())
        with socket.create_connection(address) as client:
            # Who closes first keeps the connection in TIME_WAIT.
            listener.accept()[0].close()
            client.recv(1)
    with pytest.raises(OSError, match="in use"), socket.socket() as control:
        control.bind(address)
    with hold_shared("PAYCORE_LISTEN", address), listening(*address, shared=True):
        check_taken(address)
    with hold_shared("PAYCORE_LISTEN", address):
        check_taken(address)


def test_unix_socket_cannot_be_held_for_several(tmp_path: Path) -> None:
    with pytest.raises(ListenRefusedError, match="cannot share a unix socket"):
        hold_shared("PAYCORE_LISTEN", UnixAddress(tmp_path / "s"))


def test_unix_path_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ListenRefusedError, match="another kind"):
        check_free("PAYCORE_LISTEN", UnixAddress(tmp_path / "file"))
    with pytest.raises(ListenRefusedError, match="does not exist"):
        check_free("PAYCORE_LISTEN", UnixAddress(tmp_path / "no folder" / "s"))
    check_free("PAYCORE_LISTEN", UnixAddress(tmp_path / "s"))
