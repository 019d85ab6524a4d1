"""How a run ended, as a fact in its folder, for whoever decides whether to start it again.

A launcher may have exit codes of its own: torchrun ends with 1 for any code of its processes. So a
run says in status.json that it was started, and at the end that it was stopped or has failed. Of a
finished run result.json is the fact, and status.json is taken away.
"""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from shared.errors import IncompleteCache, Stopped, TeacherCacheError
from shared.storage.base import Storage
from shared.storage.local import LocalStorage
from student_train.run_files import (
    RESULT,
    SNAPSHOT,
    STATUS,
    StatusRecord,
    read_result,
    read_status,
)

Answer = Literal["finished", "stopped, run again", "failed"]

EXIT_CODES: dict[Answer, int] = {
    "finished": 0,
    "stopped, run again": Stopped.exit_code,
    "failed": TeacherCacheError.exit_code,
}
_MAX_MESSAGE = 4096  # characters; an error of a library may quote a whole program


class RunRecord:
    """Around a run: what status.json says of it. A folder that holds no run gets no such file.

    Rank 0 writes it. A failure is written by the process that has it, and stays the first one: the
    others then fail because that one is gone. A refusal to go on is a failure too, or whoever
    starts again what was stopped would do so for ever.
    """

    def __init__(self, storage: Storage, *, main_process: bool) -> None:
        self.storage, self.main_process = storage, main_process
        self._max_steps = 0

    def __enter__(self) -> Self:
        return self

    def started(self, max_steps: int) -> None:
        """The folder is that of a run, and the work begins."""
        self._max_steps = max_steps
        if self.main_process:
            self._write(StatusRecord("started", max_steps, None))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Stopped):
            if self.main_process:
                self._write(StatusRecord("stopped", self._max_steps, str(error)))
        elif isinstance(error, Exception):  # Ctrl-C is no failure
            with suppress(TeacherCacheError):  # a full disk: the error itself is what to show
                self._write_failure(error)
        elif error is None and self.main_process:
            self.storage.delete(STATUS)

    def _write_failure(self, error: Exception) -> None:
        if not self.storage.exists(STATUS):
            return
        before = read_status(self.storage)
        if before.state != "failed":
            ours = isinstance(error, TeacherCacheError)
            message = str(error) if ours else f"{type(error).__name__}: {error}"
            short = message[:_MAX_MESSAGE]
            self._write(StatusRecord("failed", before.max_steps, short))

    def _write(self, record: StatusRecord) -> None:
        self.storage.put(STATUS, json.dumps(asdict(record), indent=1).encode())


@dataclass(frozen=True, slots=True)
class Status:
    """The answer, and what it rests on."""

    answer: Answer
    message: str

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.answer]

    @property
    def text(self) -> str:
        """The answer on a line of its own."""
        return f"{self.answer}\n{self.message}"

    def as_json(self) -> dict[str, Any]:
        return {"status": self.answer, "exit_code": self.exit_code, "message": self.message}


def status(run: Path) -> Status:
    """How the run in this folder ended. Nothing is known of one that was killed but that."""
    storage = LocalStorage(run)
    if not storage.exists(SNAPSHOT):
        raise IncompleteCache(
            f"{run}: no run was started here ({SNAPSHOT} is missing). Name the --out of a "
            "train-student run."
        )
    record = read_status(storage) if storage.exists(STATUS) else None
    result = read_result(storage) if storage.exists(RESULT) else None
    # A finished run that was asked for more steps is finished up to the old ones only.
    if result is not None and (record is None or record.max_steps <= result["max_steps"]):
        reached = f"--max-steps {result['max_steps']} or an early stop"
        return Status("finished", f"{run}: this run is finished, up to {reached}.")
    if record is None or record.message is None:
        return Status(
            "stopped, run again",
            f"{run}: the run left no word of its end: it was killed, or is still at work. If it "
            "has ended, run the same command again to go on.",
        )
    return Status("failed" if record.state == "failed" else "stopped, run again", record.message)
