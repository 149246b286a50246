"""paycore with the one order broken that durability hangs on: it answers inside the transaction, then commits.

The control of the durability tests: ``python -m tests.crash.hasty serve ...`` must be caught by each of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from paycore.cli import main
from paycore.usecases import writer
from paycore.usecases.judge import GroupJudge

_AHEAD_SECONDS = 0.2
"""How long the commit waits, so that the answer is surely out before it."""


def break_order() -> None:
    """Deliver the words of a group as soon as they are decided, and each other write as soon as it is applied."""
    taken: list[Any] = []
    take: Callable[[Any], Any] = writer.Writer._take
    judge: Callable[..., Any] = GroupJudge.judge
    apply: Callable[[Any, Any], Any] = writer._apply

    def taking(self: Any) -> Any:
        taken[:] = take(self)
        return list(taken)

    def judging(self: Any, *arguments: Any) -> Any:
        result = judge(self, *arguments)
        words = [waiting for waiting in taken if waiting.words]
        if words:
            writer._deliver(words)
            time.sleep(_AHEAD_SECONDS)
        return result

    def applying(transaction: Any, waiting: Any) -> Any:
        waiting.result, waiting.error = answer = apply(transaction, waiting)
        writer._deliver([waiting])
        time.sleep(_AHEAD_SECONDS)
        return answer

    writer._apply = applying
    writer.Writer._take = taking  # type: ignore[method-assign]  # broken on purpose
    GroupJudge.judge = judging  # type: ignore[method-assign, assignment]  # broken on purpose


if __name__ == "__main__":
    break_order()
    main()
