"""The servers' role has the rights that docs/operations.md gives it: enough for all their work, and for no other."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import psycopg
import pytest
from sqlalchemy import make_url

from paycore.store import tables
from tests.support.bank import Street, a_town
from tests.support.books import rows
from tests.support.core import check_money_rules
from tests.support.postgres import REPOSITORY, connected, fresh_postgres
from tests.support.simbank import wait_for
from tests.support.whole_work import do_everything

_roles = itertools.count(1)


def documented_grants() -> list[str]:
    """The commands of docs/operations.md that make the servers' role."""
    text = (REPOSITORY / "docs/operations.md").read_text()
    (block,) = [one for one in re.findall(r"```sql\n(.*?)```", text, re.DOTALL) if "CREATE ROLE paycore_server" in one]
    return [" ".join(one.split()) for one in re.sub(r"--.*", "", block).split(";") if one.strip()]


class Role(NamedTuple):
    """One database, by its owner and by the servers' role."""

    owner_url: str
    url: str


@pytest.fixture
def role() -> Iterator[Role]:
    owner_url = fresh_postgres()
    given = make_url(owner_url)
    name = f"paycore_server_{os.getpid()}_{next(_roles)}"
    with connected(owner_url) as connection:
        for command in documented_grants():
            own = re.sub(r"\bpaycore_server\b", name, command)
            connection.execute(re.sub(r"\bDATABASE paycore\b", f"DATABASE {given.database}", own).encode())
        yield Role(owner_url, given.set(username=name).render_as_string(hide_password=False))
    with connected(owner_url) as connection:
        connection.execute(f"DROP OWNED BY {name}".encode())
        connection.execute(f"DROP ROLE {name}".encode())


async def test_documented_rights_are_enough_for_all_that_a_server_does(role: Role, street: Street) -> None:
    async with a_town(role.url, street) as town:
        await do_everything(town, role.owner_url)
        check_money_rules(town.core.snapshot())
    # A right to delete that nothing needs is too much. A session says what it did once it has ended.
    wait_for(lambda: not unused_deletes(role), "every right to delete is used")


def unused_deletes(role: Role) -> set[str]:
    """The tables from which the servers' role may delete, and of which nothing was deleted."""
    of_role = f"privilege_type = 'DELETE' AND grantee = '{make_url(role.url).username}'"
    allowed = rows(role.owner_url, f"SELECT table_name FROM information_schema.role_table_grants WHERE {of_role}")
    used = rows(role.owner_url, "SELECT relname FROM pg_stat_user_tables WHERE n_tup_del > 0")
    assert allowed
    return {name for (name,) in allowed} - {name for (name,) in used}


def test_documented_rights_delete_no_fact(role: Role) -> None:
    """The outcome's is the one that is needed for a row that only holds a key."""
    facts = {"payment", "merchant_order", "channel_order", "excess_payment", "refund", "refund_try", "refund_result"}
    facts |= {"quarantine", "queried_paid"}
    assert facts < set(tables.METADATA.tables)
    with connected(role.url) as connection:
        for name in facts:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(f"DELETE FROM {name}".encode())
        for command in ("CREATE TABLE other (a int)", "TRUNCATE payment_outcome", "ALTER TABLE payment ADD a int"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(command.encode())
