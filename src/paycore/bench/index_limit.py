"""The check in bare C, ``index_probe.c`` beside this file, compiled when it is measured: the limit of the index."""

import ctypes
import subprocess
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

from paycore.bench.machine import compiler

SOURCE = Path(__file__).with_name("index_probe.c")
# setup.py's flags for the compiled index.
FLAGS = ("-O3", "-std=c99", "-fPIC", "-shared")


class BareC:
    """A table of open payments with one attempt each. Owns its memory until ``close``."""

    def __init__(self, folder: Path) -> None:
        """Compile into a folder. Raises OSError or CalledProcessError where there is no compiler that works."""
        library_path = folder / "index_probe.so"
        command = [compiler(), *FLAGS, "-o", str(library_path), str(SOURCE)]
        subprocess.run(command, check=True, capture_output=True)
        self._library = ctypes.CDLL(str(library_path))
        self._library.probe_make.restype = ctypes.c_void_p
        self._library.probe_free.argtypes = [ctypes.c_void_p]
        self._probe = ctypes.c_void_p(None)

    def fill(
        self,
        slots: Sequence[int],
        ids: "array[int]",
        amounts: "array[int]",
        accounts: "array[int]",
        currency: int,
        ms: int,
    ) -> None:
        """Take in the payments; slots: of each segment, a power of two of them. Raises MemoryError."""
        sizes = array("I", slots)
        self._probe = ctypes.c_void_p(
            self._library.probe_make(
                ctypes.c_uint(len(slots).bit_length() - 1),
                address(sizes),
                ctypes.c_size_t(len(ids)),
                address(ids),
                address(amounts),
                ctypes.c_uint8(currency),
                address(accounts),
                ctypes.c_uint32(ms),
            )
        )
        if self._probe.value is None:
            raise MemoryError("no memory for the table in bare C")

    def checking(self, columns: Sequence["array[int]"], *, ahead: bool) -> Callable[[], None]:
        """Check all captures by one call; ``ahead``: with prefetching."""
        count = ctypes.c_size_t(len(columns[0]))

        def run() -> None:
            self._library.probe_check(self._probe, ctypes.c_int(ahead), count, *map(address, columns))

        return run

    def close(self) -> None:
        """Release the table."""
        self._library.probe_free(self._probe)


def address(column: "array[int]") -> ctypes.c_void_p:
    """Where a column's items lie; valid while the column lives and keeps its length."""
    return ctypes.c_void_p(column.buffer_info()[0])
