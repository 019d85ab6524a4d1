"""The signals that stop a run with its work kept: SIGTERM and SIGUSR1 set a flag, nothing more."""

import atexit
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Set by SIGTERM or SIGUSR1; whoever works looks at it where it is safe to stop."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While open, SIGTERM and SIGUSR1 only set a flag."""
    request = StopRequest()
    before = {number: signal.signal(number, request) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_until_exit() -> StopRequest:
    """From now to the end of the process, SIGTERM and SIGUSR1 only set a flag.

    A launcher sends a late one to every process that has not ended when the first one has. Python
    gives handlers back while it ends, and that signal would take the place of the exit code.
    """
    request = StopRequest()
    for number in STOP_SIGNALS:
        signal.signal(number, request)
    atexit.register(_ignore_until_the_end)
    return request


def _ignore_until_the_end() -> None:
    """Signals that are ignored are the only ones whose handling Python leaves as it is."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
