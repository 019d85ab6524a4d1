"""shared/progress.py: what is shown, when, and where; all time is a fake clock."""

import io
import sys
import threading

import pytest

from shared.progress import Progress, WaitClock, duration, human


class Clock:
    """Seconds that pass only when the test says so."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_plain_stream_gets_a_first_line_one_every_30_s_and_a_last_one():
    stream, clock = io.StringIO(), Clock()
    with Progress("cache-teacher", 1000, stream=stream, clock=clock) as progress:
        for _ in range(9):
            clock.now_s += 10.0
            progress.advance(100, bytes_per_token=57.44, waiting="teacher 96 %")
    assert stream.getvalue().splitlines() == [
        "cache-teacher   0% 0/1.00k tokens",
        "cache-teacher  30% 300/1.00k tokens  10.0 tokens/s  ETA 1m10s  "
        "57.4 bytes/token  waiting: teacher 96 %",
        "cache-teacher  60% 600/1.00k tokens  10.0 tokens/s  ETA 40s  "
        "57.4 bytes/token  waiting: teacher 96 %",
        "cache-teacher  90% 900/1.00k tokens  10.0 tokens/s  ETA 10s  "
        "57.4 bytes/token  waiting: teacher 96 %",
        "cache-teacher  90% 900/1.00k tokens  10.0 tokens/s  "
        "57.4 bytes/token  waiting: teacher 96 %  done after 1m30s",
    ]


def test_what_an_earlier_run_did_counts_as_done_but_not_into_the_rate():
    stream, clock = io.StringIO(), Clock()
    with Progress("run", 100, done=50, unit="steps", stream=stream, clock=clock) as progress:
        clock.now_s += 30.0
        progress.advance(15, loss=2.5)
    line = stream.getvalue().splitlines()[1]
    assert line == "run  65% 65/100 steps  0.500 steps/s  ETA 1m10s  loss 2.50"


def test_an_unknown_total_shows_no_percentage_and_no_eta():
    stream, clock = io.StringIO(), Clock()
    with Progress("run", None, stream=stream, clock=clock) as progress:
        clock.now_s += 30.0
        progress.advance(60)
    assert stream.getvalue().splitlines()[1] == "run 60 tokens  2.00 tokens/s"


@pytest.mark.parametrize(
    ("total", "done", "percent"), [(0, 0, 100), (10, 12, 100), (1000, 999, 99)]
)
def test_the_percentage_is_100_at_the_end_only(total, done, percent):
    stream = io.StringIO()
    with Progress("run", total, stream=stream, clock=Clock()) as progress:
        progress.advance(done)
    assert stream.getvalue().splitlines()[-1].startswith(f"run {percent:3d}% {done}/")


def test_an_error_inside_is_not_called_done():
    stream = io.StringIO()
    with pytest.raises(KeyError), Progress("run", 10, stream=stream, clock=Clock()):
        raise KeyError
    assert stream.getvalue().splitlines()[-1].endswith("stopped after 0s")


def test_threads_lose_no_count():
    stream = io.StringIO()
    with Progress("run", 4000, stream=stream, clock=Clock()) as progress:
        work = [
            threading.Thread(target=lambda: [progress.advance(1) for _ in range(1000)])
            for _ in range(4)
        ]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
    assert "100% 4.00k/4.00k tokens" in stream.getvalue().splitlines()[-1]


def test_a_terminal_gets_a_bar_and_stdout_gets_nothing(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream, clock = Terminal(), Clock()
    with Progress("[run]", 10, stream=stream, clock=clock) as progress:
        clock.now_s += 1.0
        progress.advance(10)
        sys.stdout.write("a result\n")
    shown = stream.getvalue()
    assert "[run]" in shown
    assert "━" in shown
    assert "100% 10/10 tokens  10.0 tokens/s  done after 1s" in shown
    assert capsys.readouterr().out == "a result\n"


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress("run", 10, stream=stream, clock=Clock()):
        pass
    assert stream.getvalue().splitlines() == [
        "run   0% 0/10 tokens",
        "run   0% 0/10 tokens  done after 0s",
    ]


def test_the_default_stream_is_stderr(capsys):
    with Progress("run", 1, clock=Clock()) as progress:
        progress.advance(1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("run   0% 0/1 tokens\nrun 100%")


def test_waits_are_added_up_by_name_and_shared_out_over_the_time_since_the_start():
    clock = Clock()
    waits = WaitClock(clock)
    for name, seconds in (("disk", 1.0), ("teacher", 80.9), ("disk", 1.0), ("encode", 0.1)):
        with waits(name):
            clock.now_s += seconds
    clock.now_s += 17.0  # nobody waits
    # The fake clock adds up to 100 s in floats: equal but for their rounding.
    assert waits.seconds() == pytest.approx({"disk": 2.0, "teacher": 80.9, "encode": 0.1})
    assert waits.shares() == pytest.approx({"disk": 0.02, "teacher": 0.809, "encode": 0.001})
    assert waits.text() == "teacher 81 % disk 2 %"


def test_a_wait_that_ends_in_an_error_counts():
    clock = Clock()
    waits = WaitClock(clock)

    def fail_after_3_s() -> None:
        with waits("teacher"):
            clock.now_s += 3.0
            raise KeyError

    with pytest.raises(KeyError):
        fail_after_3_s()
    assert waits.seconds() == {"teacher": 3.0}


def test_a_new_clock_has_waited_for_nothing():
    waits = WaitClock(Clock())
    with waits("disk"):
        pass
    assert (waits.shares(), waits.text()) == ({"disk": 0.0}, "")


def test_waits_of_several_threads_are_not_lost():
    clock = Clock()
    waits = WaitClock(clock)
    inside = threading.Barrier(5)
    leave = threading.Event()

    def wait_once() -> None:
        with waits("disk"):
            inside.wait(timeout=60)
            leave.wait(timeout=60)

    threads = [threading.Thread(target=wait_once) for _ in range(4)]
    for thread in threads:
        thread.start()
    inside.wait(timeout=60)
    clock.now_s += 2.0
    leave.set()
    for thread in threads:
        thread.join()
    assert waits.seconds() == {"disk": 8.0}


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (999_499, "999k"),
        (999_999, "1.00M"),
        (12_345_678, "12.3M"),
        (30_000_000_000, "30.0G"),
        (5.0, "5.00"),
        (999.7, "1.00k"),
        (0.01234, "0.0123"),
        (-45_100.0, "-45.1k"),
    ],
)
def test_numbers_are_three_digits_and_a_unit(number, text):
    assert human(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (392, "6m32s"), (82_320, "22h52m"), (273_600, "3d04h")],
)
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text
