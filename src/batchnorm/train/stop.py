"""Signals that end a training after the step at hand."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingStopped(KeyboardInterrupt):
    """A signal ended the training after a checkpoint was written; the same call goes on from there.

    A KeyboardInterrupt, so that code which survives ordinary errors does not swallow it.
    """

    def __init__(self, signal_number: int, step: int, out: Path) -> None:
        name = signal.Signals(signal_number).name
        super().__init__(
            f"{name}: stopped after step {step}, which is saved in {out}; train there again to go on"
        )
        self.signal_number = signal_number
        self.step = step


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT append to. The second one acts as if there were no training."""
    requests: list[int] = []
    # Only the main thread may set handlers; elsewhere signals are the business of whoever owns it.
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    earlier = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in earlier.items():
            signal.signal(number, handler)

    def request(number: int, frame: FrameType | None) -> None:
        requests.append(number)
        restore()

    for number in earlier:
        signal.signal(number, request)
    try:
        yield requests
    finally:
        restore()
