"""What goes into one commit: under load also what keeps coming; a write that comes alone waits for nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from paycore.domain.verdicts import NotifyOutcome
from paycore.usecases import writer as writer_module
from tests.support.clock import ManualClock
from tests.support.core import Core, fresh_database

FAR_SECONDS = 60


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    with Core(fresh_database(tmp_path / "paycore.db"), clock=ManualClock()) as core:
        yield core


def set_gathering(monkeypatch: pytest.MonkeyPatch, *, pause_seconds: float, limit_seconds: float) -> None:
    monkeypatch.setattr(writer_module, "GATHER_PAUSE_SECONDS", pause_seconds)
    monkeypatch.setattr(writer_module, "GATHER_LIMIT_NS", int(limit_seconds * 1e9))


def commits(core: Core) -> int:
    return core.count("paycore_commit_group_size_count")


async def test_writer_under_load_commits_together_what_keeps_coming(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_id, second_id = await core.make_payment(), await core.make_payment()
    set_gathering(monkeypatch, pause_seconds=0.5, limit_seconds=FAR_SECONDS)
    core.writer._last_size = 2  # as after a group of two: there is load
    before = commits(core)
    first = asyncio.create_task(core.notify(core.word(first_id)))
    await asyncio.wait({first}, timeout=0.1)
    assert not first.done(), "the first was committed before anything else could come"
    verdicts = await asyncio.gather(first, core.notify(core.word(second_id)))
    assert [verdict.outcome for verdict in verdicts] == [NotifyOutcome.ACCEPTED] * 2
    assert commits(core) == before + 1


async def test_writer_under_load_that_does_not_end_commits_at_the_limit(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    payment_id = await core.make_payment()
    set_gathering(monkeypatch, pause_seconds=0.01, limit_seconds=0.1)
    core.writer._last_size = 2

    async def keep_coming() -> None:
        while True:
            words.append(asyncio.create_task(core.notify(core.word(payment_id, trade_no=f"T{len(words)}"))))
            await asyncio.sleep(0.001)

    words: list[asyncio.Task[object]] = []
    coming = asyncio.create_task(keep_coming())
    try:
        first = asyncio.create_task(core.notify(core.word(payment_id, trade_no="first")))
        await asyncio.wait_for(first, FAR_SECONDS)
    finally:
        coming.cancel()
    assert len(words) < writer_module.MAX_GROUP // 2, "the first waited until the group was full"
    await asyncio.gather(*words)


async def test_writer_without_load_commits_a_single_write_at_once(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    payment_id = await core.make_payment()
    set_gathering(monkeypatch, pause_seconds=FAR_SECONDS, limit_seconds=FAR_SECONDS)
    verdict = await asyncio.wait_for(core.notify(core.word(payment_id)), FAR_SECONDS / 4)
    assert verdict.outcome == NotifyOutcome.ACCEPTED


async def test_writer_without_load_commits_a_batch_that_comes_alone_at_once(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [await core.make_payment() for _ in range(3)]
    set_gathering(monkeypatch, pause_seconds=FAR_SECONDS, limit_seconds=FAR_SECONDS)
    words = [core.word(payment_id) for payment_id in ids]
    verdicts = await asyncio.wait_for(core.notify_many(*words), FAR_SECONDS / 4)
    assert [verdict.outcome for verdict in verdicts] == [NotifyOutcome.ACCEPTED] * 3
