"""``python -m tests.crash``: a long run by hand. Prints the seed first, so that its plan can be drawn again."""

from __future__ import annotations

import argparse
import asyncio
import secrets
import signal
import sys
import tempfile
from pathlib import Path

from tests.crash.run import crash
from tests.support.databases import KINDS, make_database


def _say(line: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()


def main() -> int:
    """Return 0 where every kill was survived and every point struck often enough."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="how many at least, on each store")
    parser.add_argument("--store", choices=[*KINDS, "all"], default="all")
    parser.add_argument("--seed", type=int, default=None, help="the seed that an earlier run has printed")
    asked = parser.parse_args()
    # Whoever ends it by SIGTERM leaves no banks and no server behind either.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    seed = secrets.randbits(32) if asked.seed is None else asked.seed
    survived = True
    for store in KINDS if asked.store == "all" else (asked.store,):
        print(f"store {store}, kills {asked.kills}, seed {seed}", flush=True)
        with tempfile.TemporaryDirectory(prefix="paycore-crash-") as folder:
            url = make_database(store, Path(folder))
            verdict = asyncio.run(crash(url, Path(folder), kills=asked.kills, seed=seed, say=_say))
        _say("")
        print(verdict.text(), flush=True)
        survived &= verdict.survived
    return 0 if survived else 1


if __name__ == "__main__":
    sys.exit(main())
