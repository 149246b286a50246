"""Imports point downward only: the floor plan as a table, and proofs that a breach is seen.

cli, app  ->  rpc | jobs  ->  usecases  ->  store | channels  ->  domain
                                 \\->  _wire  ->  _dedupe
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.imports import ROOT_LAYER, Rules, collect, violations

SOURCE = Path(__file__).parents[2] / "src"

# What says nothing about payments and may be used on every floor but domain's.
LEAVES = {"failpoint", "metrics"}
SERVER = {"rpc", "jobs", "usecases", "store", "channels", "domain", "_group", "_wire", "_dedupe"} | LEAVES
EVERYTHING = SERVER | {ROOT_LAYER, "app", "bench", "client", "settings", "simbank", "v1"}

LAYERS = {
    ROOT_LAYER: set(),
    # Pure: not even the leaves, which touch the environment and global counters.
    "domain": set(),
    "failpoint": set(),
    "metrics": {"domain"},
    "v1": set(),
    "_table": set(),
    "_dedupe": {"_table"},
    "_protobuf": set(),
    "_notes": {"_dedupe", "_protobuf"},
    "_wire": {"_dedupe", "_notes", "_protobuf"},
    "_group": {"_wire", "_dedupe"},
    # A stub only names types, for type checkers; the compiled modules themselves take plain tuples.
    "_dedupe.pyi": {"domain"},
    "_wire.pyi": {"domain", "_dedupe"},
    "_group.pyi": {"_wire", "_dedupe"},
    "settings": {"domain"},
    # Side by side: neither knows the other.
    "store": {"domain"} | LEAVES,
    "channels": {"domain"} | LEAVES,
    "usecases": {"store", "channels", "domain", "_group", "_wire", "_dedupe"} | LEAVES,
    # Side by side again. Handlers reach rows and channels through use cases only.
    "rpc": {"usecases", "domain", "v1", "_wire", ROOT_LAYER} | LEAVES,
    "jobs": {"usecases", "store", "channels", "domain"} | LEAVES,
    # What a caller imports; it must run where there is no server.
    "client": {"v1", ROOT_LAYER},
    # Another company's process: it knows paycore by its public API alone.
    "simbank": {"client", "v1", "failpoint"},
    "bench": EVERYTHING - {"simbank"},
    "app": EVERYTHING - {"bench", "client", "simbank"},
    "cli": EVERYTHING - {"_group", "_wire", "_dedupe"},
}

GRPC = {"rpc", "client", "app", "cli", "bench", "v1"}
OUTSIDE = {
    "alembic": {"store"},
    "click": {"cli"},
    "google": GRPC | {"simbank"},  # protobuf's own messages, Timestamp among them, and google.rpc
    "grpc": GRPC | {"simbank"},  # the forwarder is a caller of the public API
    "grpc_health": GRPC,
    "grpc_reflection": GRPC,
    "grpc_status": GRPC,
    "httpx": {"channels", "simbank", "cli"},
    "jinja2": {"simbank"},
    "prometheus_client": {"metrics", "app", "bench"},
    "psycopg": {"store", "bench"},
    "pydantic": {"settings", "simbank"},
    "pydantic_core": {"settings"},
    "pydantic_settings": {"settings"},
    "rich": {"cli"},
    "segno": {"simbank", "cli"},
    "sqlalchemy": {"store"},
    # The banks keep books of their own; the demo counts rows from outside, the benchmarks write and count them.
    "sqlite3": {"store", "simbank", "cli", "bench"},
    "starlette": {"simbank", "app"},
    "structlog": {"app", "cli", "rpc", "jobs", "usecases", "store", "channels", "simbank"},
    "typer": {"cli"},
    "typing_extensions": {"_dedupe.pyi", "_wire.pyi"},  # never imported: type checkers always know it
    "uvicorn": {"simbank", "app"},
    "uvloop": {"app", "cli", "bench", "simbank"},
    # Cython's own: C declarations, nothing that runs.
    "cpython": {"_dedupe", "_group", "_wire"},
    "cython": {"_dedupe", "_group", "_wire"},
    "libc": {"_dedupe", "_group", "_notes", "_protobuf", "_table", "_wire"},
}

STANDARD_LIBRARY = {
    # No clock, no chance, no files, no environment: the same input gives the same answer.
    "domain": {
        "__future__",
        "abc",
        "array",
        "collections",
        "dataclasses",
        "enum",
        "functools",
        "hashlib",
        "itertools",
        "operator",
        "re",
        "string",
        "struct",
        "sys",  # how large an object is
        "threading",  # a lock around the sequence of payment ids
        "types",
        "typing",
        "unicodedata",
        "urllib.parse",  # takes an address apart, opens nothing
    },
}

RULES = Rules("paycore", LAYERS, OUTSIDE, STANDARD_LIBRARY)


def test_imports_of_paycore_point_downward() -> None:
    found = violations(SOURCE, RULES)
    assert not found, "\n".join(["imports that no rule allows:", *found])


def test_rules_see_the_packages_own_imports() -> None:
    """Without this, a wrong path would make the test above pass on nothing."""
    seen = {(one.layer, one.target.split(".")[0]) for one in collect(SOURCE, "paycore")}
    assert {("store", "sqlalchemy"), ("store", "paycore"), ("domain", "enum")} <= seen


# One file each, with one import too many; the file's line that must be named, and what must be said.
BREACHES = [
    ("domain/money.py", "import paycore.store", 1, "domain must not import store"),
    ("domain/money.py", "from ..store import tables", 1, "domain must not import store"),
    ("domain/money.py", "from .. import store", 1, "domain must not import store"),
    ("domain/__init__.py", "from .. import metrics", 1, "domain must not import metrics"),
    ("domain/money.py", "from paycore import store", 1, "domain must not import store"),
    ("domain/money.py", "def f():\n    from paycore.store import tables\n", 2, "domain must not import store"),
    (
        "domain/money.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from paycore.store import tables\n",
        3,
        "domain must not import store",
    ),
    (
        "domain/money.py",
        "import paycore.domain as d\nd.importlib.import_module('paycore.store')",
        2,
        "domain must not import store",
    ),
    ("domain/money.py", "__import__('paycore.store.tables')", 1, "domain must not import store"),
    ("domain/money.pyi", "from paycore.store import tables", 1, "domain must not import store"),
    ("domain/money.py", "import time", 1, "domain must not import time"),
    ("domain/money.py", "import datetime", 1, "domain must not import datetime"),
    ("domain/money.py", "import sqlite3", 1, "domain must not import sqlite3"),
    ("domain/money.py", "import os.path", 1, "domain must not import os.path"),
    ("domain/money.py", "import urllib", 1, "domain must not import urllib"),
    ("domain/money.py", "from urllib import request", 1, "domain must not import urllib.request"),
    ("domain/money.py", "def f():\n    import random", 2, "domain must not import random"),
    ("store/sqlite.py", "from paycore.channels import registry", 1, "store must not import channels"),
    ("channels/bank.py", "from paycore.store import tables", 1, "channels must not import store"),
    ("store/sqlite.py", "from paycore._dedupe import Index", 1, "store must not import _dedupe"),
    ("rpc/server.py", "from paycore.jobs import runner", 1, "rpc must not import jobs"),
    ("jobs/runner.py", "from paycore.rpc import server", 1, "jobs must not import rpc"),
    ("rpc/server.py", "from paycore._dedupe import Index", 1, "rpc must not import _dedupe"),
    ("usecases/pay.py", "from paycore.settings import Settings", 1, "usecases must not import settings"),
    ("usecases/pay.py", "import sqlalchemy.exc", 1, "usecases must not import sqlalchemy"),
    ("usecases/pay.py", "import sqlite3", 1, "usecases must not import sqlite3"),
    ("usecases/pay.py", "import grpc.aio", 1, "usecases must not import grpc"),
    ("usecases/pay.py", "import httpx", 1, "usecases must not import httpx"),
    ("usecases/pay.py", "from paycore.v1 import payment_pb2", 1, "usecases must not import v1"),
    ("client/sync.py", "from paycore.domain import money", 1, "client must not import domain"),
    ("simbank/books.py", "from paycore.domain import money", 1, "simbank must not import domain"),
    ("simbank/books.py", "import grpc_status", 1, "simbank must not import grpc_status"),
    ("simbank/books.py", "import requests", 1, "no rule for requests: add it to the table"),
    ("newcomer.py", "import enum", 1, "no rule for the layer newcomer: add it to the table"),
    (
        "_dedupe.pyx",
        "from libc.stdint cimport int64_t\nfrom paycore._wire cimport Item",
        2,
        "_dedupe must not import _wire",
    ),
    ("_dedupe.pyx", "from paycore cimport _wire", 1, "_dedupe must not import _wire"),
    ("_dedupe.pyx", "cimport paycore._wire as w", 1, "_dedupe must not import _wire"),
    ("_dedupe.pyx", "from ._wire cimport (\n    Item,\n    Batch)", 1, "_dedupe must not import _wire"),
    ("_dedupe.pyx", "from . cimport _wire", 1, "_dedupe must not import _wire"),
    ("_dedupe.pxd", "\n\n    from paycore._wire cimport Item", 3, "_dedupe must not import _wire"),
    ("_dedupe.pyx", "def f():\n    from paycore.domain import money", 2, "_dedupe must not import domain"),
    ("_dedupe.pyx", "cdef f(): import paycore.store", 1, "_dedupe must not import store"),
    ("_dedupe.pyi", "from paycore.store import tables", 1, "_dedupe.pyi must not import store"),
    ("_dedupe.pyi", "import typing_extensions\nimport sqlalchemy", 2, "_dedupe.pyi must not import sqlalchemy"),
    ("_wire.pyx", "from cpython.mem cimport PyMem_Malloc\ncimport numpy", 2, "no rule for numpy: add it to the table"),
    ("_wire.pyx", 'include "shared.pxi"', 1, "no rule for (include): add it to the table"),
]

# What the rules must let through, in the same small package.
ALLOWED = [
    ("domain/money.py", "from paycore.domain import ids\nfrom . import ids\nfrom collections.abc import Set"),
    ("domain/money.py", "from urllib.parse import urlsplit\nfrom urllib import parse\nimport urllib.parse"),
    ("domain/money.py", '"""import paycore.store"""\n# import paycore.store'),
    ("store/sqlite.py", "import sqlite3\nimport sqlalchemy\nfrom paycore import domain, failpoint, metrics"),
    ("usecases/pay.py", "import time\nfrom paycore import store, channels\nfrom paycore._dedupe import Index"),
    ("rpc/server.py", "import grpc\nfrom paycore import __version__\nfrom paycore.v1 import payment_pb2"),
    ("simbank/books.py", "import sqlite3\nfrom paycore.client import sync\nfrom . import faults"),
    ("_dedupe.pyx", '"""Docs:\nimport paycore.store\n"""\n# cimport paycore._wire\ncdef extern from "stdlib.h": pass'),
    ("_dedupe.pyi", "from paycore.domain import money\nfrom typing_extensions import Buffer"),
    ("_wire.pyx", "from paycore._dedupe cimport Record\ncimport cython\nfrom libc.string cimport memcpy, memset"),
]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder that holds a package `paycore` with every layer, all of them empty."""
    folders = [layer for layer in LAYERS if layer != ROOT_LAYER and not layer.startswith("_")]
    for folder in folders:
        (tmp_path / "paycore" / folder).mkdir(parents=True)
    for compiled in ("_dedupe", "_wire"):
        (tmp_path / "paycore" / f"{compiled}.pyx").touch()
    return tmp_path


@pytest.mark.parametrize(("file", "text", "line", "said"), BREACHES)
def test_breach_planted_in_a_package_is_named(package: Path, file: str, text: str, line: int, said: str) -> None:
    (package / "paycore" / file).write_text(text, encoding="utf-8")
    assert f"paycore/{file}:{line}: {said}" in violations(package, RULES)


@pytest.mark.parametrize(("file", "text"), ALLOWED)
def test_import_that_points_downward_is_let_through(package: Path, file: str, text: str) -> None:
    (package / "paycore" / file).write_text(text, encoding="utf-8")
    assert violations(package, RULES) == []
