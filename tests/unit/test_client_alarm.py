"""The alarm of the thread-safe notifier: functions in the order of their times, and none after its end."""

from __future__ import annotations

import queue
import threading

from paycore.client.alarm import Alarm
from paycore.client.requests import milliseconds_now


def test_functions_are_called_in_the_order_of_their_times_and_not_before() -> None:
    called: queue.Queue[tuple[str, int]] = queue.Queue()
    alarm = Alarm("alarm-test")
    try:
        now_ms = milliseconds_now()
        for name, delay_ms in (("third", 120), ("first", 40), ("second", 80)):
            alarm.at(now_ms + delay_ms, lambda name=name: called.put((name, milliseconds_now())))  # type: ignore[misc]
        found = [called.get(timeout=10) for _ in range(3)]
    finally:
        alarm.stop()
    assert [name for name, _ in found] == ["first", "second", "third"]
    assert all(at_ms >= now_ms + due for (_, at_ms), due in zip(found, (40, 80, 120), strict=True))


def test_function_due_sooner_than_what_is_waited_for_is_not_late() -> None:
    called = threading.Event()
    alarm = Alarm("alarm-test")
    try:
        alarm.at(milliseconds_now() + 60_000, lambda: None)
        alarm.at(milliseconds_now() + 10, called.set)
        assert called.wait(10)
    finally:
        alarm.stop()


def test_stopped_alarm_has_no_thread_and_calls_nothing() -> None:
    called = threading.Event()
    alarm = Alarm("alarm-test-stopped")
    alarm.at(milliseconds_now() + 30, called.set)
    alarm.stop()
    alarm.at(milliseconds_now(), called.set)
    assert "alarm-test-stopped" not in {thread.name for thread in threading.enumerate()}
    assert not called.wait(0.1)


def test_alarm_that_is_stopped_by_its_own_function_ends() -> None:
    alarm = Alarm("alarm-test-own")
    alarm.at(milliseconds_now() + 100, alarm.stop)
    (thread,) = (each for each in threading.enumerate() if each.name == "alarm-test-own")
    thread.join(10)
    assert not thread.is_alive()
