"""Signals that only set a flag, for a while or up to the very end of the process."""

import os
import signal
import subprocess
import sys

import pytest

from shared.signals import stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_sets_a_flag_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    assert signal.getsignal(number) is before


# The object is deleted when Python has run what atexit holds and taken its modules apart.
_LATE = """
import atexit, os, signal, sys
from shared.signals import stop_until_exit

class Late:
    def __del__(self, kill=os.kill, process=os.getpid(), number=int(sys.argv[1])):
        kill(process, number)

late = Late()
atexit.register(late.__del__)
stop = stop_until_exit()
os.kill(os.getpid(), int(sys.argv[1]))
assert stop.requested
sys.exit(75)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_no_signal_takes_the_place_of_the_exit_code(number):
    done = subprocess.run([sys.executable, "-c", _LATE, str(int(number))])
    assert done.returncode == 75
