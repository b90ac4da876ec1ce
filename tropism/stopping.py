"""Stopping when asked: Ctrl-C and SIGTERM let the step that has begun finish; a second one stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_when_asked(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Inside, the first signal is noted, and the function that is given says so; another is a KeyboardInterrupt.

    Outside the main thread, where Python sets no signal handlers, nothing is noted.
    """
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        say("stopping after this step, with a checkpoint; once more stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
