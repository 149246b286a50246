"""Where a server may listen: loopback and unix sockets only, because there is no access control."""

import ipaddress
import re
import socket
import stat
from pathlib import Path
from typing import NamedTuple

LISTEN_SETTING = "PAYCORE_LISTEN"
UNIX_PREFIX = "unix:"

_PORT = re.compile(r"[0-9]{1,5}", re.ASCII)
_MAX_PORT = 65_535
# What the kernel's sockaddr_un holds, with its closing NUL.
_MAX_UNIX_PATH_BYTES = 107


class ListenRefusedError(Exception):
    """An address cannot be listened on; the message is one line that says why and what to do."""


class TcpAddress(NamedTuple):
    """A loopback address; port 0 takes any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class UnixAddress(NamedTuple):
    """A socket in the file system."""

    path: Path

    def __str__(self) -> str:
        return f"{UNIX_PREFIX}{self.path}"


def parse_listen(setting: str, text: str) -> TcpAddress | UnixAddress:
    """Read host:port or unix:PATH. ``setting`` names it in the message. Raises ListenRefusedError."""
    if text.startswith(UNIX_PREFIX):
        return _parse_unix(setting, text.removeprefix(UNIX_PREFIX))
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not _PORT.fullmatch(port) or int(port) > _MAX_PORT:
        raise ListenRefusedError(f"{setting} {text}: must be host:port or unix:PATH, for example 127.0.0.1:50051")
    return TcpAddress(_loopback(setting, text, host), int(port))


def _parse_unix(setting: str, path: str) -> UnixAddress:
    if not path or len(path.encode()) > _MAX_UNIX_PATH_BYTES:
        raise ListenRefusedError(f"{setting}: the path of a unix socket must have 1 to {_MAX_UNIX_PATH_BYTES} bytes")
    return UnixAddress(Path(path))


def _loopback(setting: str, text: str, host: str) -> str:
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        address = None
    if address is None or not address.is_loopback:
        raise ListenRefusedError(
            f"{setting} {text}: refused: paycore has no access control, so it listens on loopback only;"
            " use 127.0.0.1, [::1], localhost or unix:PATH"
        )
    return str(address)


def check_free(setting: str, address: TcpAddress | UnixAddress) -> None:
    """Refuse an address that somebody listens on. Raises ListenRefusedError.

    gRPC tells a failed bind without its cause, and takes a unix socket away from whoever serves on it.
    """
    if isinstance(address, UnixAddress):
        _check_unix_free(setting, address)
        return
    try:
        _bound(address, reuse=True).close()
    except OSError as error:
        raise taken(setting, address, error.strerror or "cannot be bound") from None


def hold_shared(setting: str, address: TcpAddress | UnixAddress) -> socket.socket:
    """Take a TCP address for processes that will share it (SO_REUSEPORT); port 0 takes any free one. To be closed.

    The socket never listens, so no call comes to it. While it is open the port belongs to those who share it, and a
    second server is refused, also while none of them listens. Raises ListenRefusedError.
    """
    if isinstance(address, UnixAddress):
        raise ListenRefusedError(
            f"{setting} {address}: several workers cannot share a unix socket; give host:port, or one worker"
        )
    if not hasattr(socket, "SO_REUSEPORT"):
        raise ListenRefusedError(f"{setting} {address}: several workers cannot share a port on this system")
    try:
        holder = _bound(address, reuse=False)
    except OSError:
        # Connections of a server that has ended may linger there (TIME_WAIT); a listener is still refused.
        try:
            holder = _bound(address, reuse=True)
        except OSError as error:
            raise taken(setting, address, error.strerror or "cannot be bound") from None
    # Only now: sharing from the beginning would let a second holder in.
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return holder


def _bound(address: TcpAddress, *, reuse: bool) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        # As gRPC binds: connections that linger in TIME_WAIT do not count, a listener does.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuse))
        made.bind((address.host, address.port))
    except OSError:
        made.close()
        raise
    return made


def _check_unix_free(setting: str, address: UnixAddress) -> None:
    path = address.path
    if not path.parent.is_dir():
        raise ListenRefusedError(f"{setting} {address}: the folder {path.parent} does not exist")
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise ListenRefusedError(f"{setting} {address}: a file of another kind is there; choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return  # left over by a server that has ended
    raise taken(setting, address, "Address already in use")


def taken(setting: str, address: TcpAddress | UnixAddress, why: str) -> ListenRefusedError:
    """Say that an address cannot be had, and what to do."""
    return ListenRefusedError(
        f"{setting} {address}: {why}; stop what listens there, or choose another (port 0 takes any free one)"
    )
