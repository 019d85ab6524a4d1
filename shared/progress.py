"""Progress of a long piece of work, and who waits for whom: a bar on a terminal, else plain lines.

    cache-teacher  41% 12.3M/30.0M tokens  45.1k tokens/s  ETA 6m32s  57.4 bytes/token  waiting: ...

Everything goes to stderr, so that stdout holds results only.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol, Self, TextIO

Clock = Callable[[], float]


class Progress:
    """Counts work done and shows it; `advance` may be called from several threads.

    A plain stream gets a first line, one every `interval_s` seconds, and a last one.
    """

    def __init__(
        self,
        title: str,
        total: int | None,
        *,
        done: int = 0,
        unit: str = "tokens",
        stream: TextIO | None = None,
        clock: Clock = time.monotonic,
        interval_s: float = 30.0,
    ) -> None:
        """`total` None: not known. `done`: finished by an earlier run, so no part of the rate."""
        self._total, self._unit = total, unit
        self._done = self._done_before = done
        self._clock = clock
        self._fields: dict[str, float | str] = {}
        self._lock = threading.Lock()
        stream = sys.stderr if stream is None else stream
        self._display: _Display = _Lines(stream, title, clock, interval_s)
        if stream.isatty() and os.environ.get("TERM") != "dumb":
            self._display = _Bar(stream, title)

    def __enter__(self) -> Self:
        self._started_s = self._clock()
        self._display.start(self._line(with_eta=True), self._percent())
        return self

    def advance(self, n: int, **fields: float | str) -> None:
        """Adds n units; a field stays until it is given again.

        `bytes_per_token=57.4` is shown as "57.4 bytes/token", `loss=2.1` as "loss 2.1" and
        `waiting="disk 2 %"` as "waiting: disk 2 %".
        """
        with self._lock:
            self._done += n
            self._fields |= fields
            self._display.update(lambda: self._line(with_eta=True), self._percent())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        elapsed_s = self._clock() - self._started_s
        end = f"{'done' if error is None else 'stopped'} after {duration(elapsed_s)}"
        self._display.stop(f"{self._line(with_eta=False)}  {end}", self._percent())

    def _percent(self) -> float | None:
        if self._total is None:
            return None
        return 100.0 if self._done >= self._total else 100.0 * self._done / self._total

    def _line(self, *, with_eta: bool) -> str:
        percent = self._percent()
        elapsed_s = self._clock() - self._started_s
        done_here = self._done - self._done_before
        rate = done_here / elapsed_s if elapsed_s > 0 else 0.0
        of_total = "" if self._total is None else f"/{human(self._total)}"
        count = f"{human(self._done)}{of_total} {self._unit}"
        parts = [count if percent is None else f"{int(percent):3d}% {count}"]
        if rate > 0:
            parts.append(f"{human(rate)} {self._unit}/s")
        if with_eta and rate > 0 and self._total is not None and self._done < self._total:
            parts.append(f"ETA {duration((self._total - self._done) / rate)}")
        return "  ".join([*parts, *(_field(*item) for item in self._fields.items())])


class WaitClock:
    """Adds up the seconds spent waiting, by name, over all threads: `with waits("teacher"): ...`"""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock, self._started_s = clock, clock()
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts the block, also when it raises."""
        started_s = self._clock()
        try:
            yield
        finally:
            waited_s = self._clock() - started_s
            with self._lock:
                self._seconds[name] = self._seconds.get(name, 0.0) + waited_s

    def seconds(self) -> dict[str, float]:
        with self._lock:
            return dict(self._seconds)

    def shares(self) -> dict[str, float]:
        """Shares of the time since this clock began; above 1 where several threads wait at once."""
        elapsed_s = self._clock() - self._started_s
        return {name: s / elapsed_s if elapsed_s > 0 else 0.0 for name, s in self.seconds().items()}

    def text(self) -> str:
        """Largest first, as in "teacher 96 % disk 2 %"; what rounds to 0 % is left out."""
        shares = sorted(self.shares().items(), key=lambda item: -item[1])
        return " ".join(
            f"{name} {share:.0%}".replace("%", " %") for name, share in shares if share >= 0.005
        )


def human(number: float) -> str:
    """Three digits and a unit: 12.3M, 45.1k, 57.4, 0.0123; a whole number below 1,000 as it is."""
    if isinstance(number, int) and abs(number) < 1000:
        return str(number)
    rounded = float(f"{number:.3g}")  # first, or 999,999 would be 1000k
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(rounded) >= limit:
            return f"{rounded / limit:#.3g}".rstrip(".") + unit
    return f"{rounded:#.3g}".rstrip(".")


def duration(seconds: float) -> str:
    """45s, 6m32s, 22h52m or 3d04h."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    if hours:
        return f"{h}h{m:02d}m"
    return f"{m}m{s:02d}s" if m else f"{s}s"


def _field(name: str, value: float | str) -> str:
    words = name.replace("_per_", "/").replace("_", " ")
    if isinstance(value, str):
        return f"{words}: {value}"
    return f"{human(value)} {words}" if "/" in words else f"{words} {human(value)}"


class _Display(Protocol):
    def start(self, line: str, percent: float | None) -> None: ...
    def update(self, make_line: Callable[[], str], percent: float | None) -> None: ...
    def stop(self, line: str, percent: float | None) -> None: ...


class _Lines:
    def __init__(self, stream: TextIO, title: str, clock: Clock, interval_s: float) -> None:
        self._stream, self._title, self._clock = stream, title, clock
        self._interval_s = interval_s

    def start(self, line: str, percent: float | None) -> None:
        self._write(line)

    def update(self, make_line: Callable[[], str], percent: float | None) -> None:
        if self._clock() - self._written_s >= self._interval_s:
            self._write(make_line())

    def stop(self, line: str, percent: float | None) -> None:
        self._write(line)

    def _write(self, line: str) -> None:
        self._written_s = self._clock()
        self._stream.write(f"{self._title} {line}\n")
        self._stream.flush()


class _Bar:
    def __init__(self, stream: TextIO, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        one_line = Column(no_wrap=True, overflow="ellipsis")
        self._rich = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[line]}", markup=False, table_column=one_line),
            console=Console(file=stream),
            redirect_stdout=False,  # or what is printed there would end up on stderr
        )
        self._task = self._rich.add_task(title, total=None, line="")

    def start(self, line: str, percent: float | None) -> None:
        self._show(line, percent)
        self._rich.start()

    def update(self, make_line: Callable[[], str], percent: float | None) -> None:
        self._show(make_line(), percent)

    def stop(self, line: str, percent: float | None) -> None:
        self._show(line, percent)
        self._rich.stop()

    def _show(self, line: str, percent: float | None) -> None:
        total = None if percent is None else 100.0
        self._rich.update(self._task, completed=percent or 0.0, total=total, line=line)
