"""Stage two: streams a cache into a training loop; never loads a teacher."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from student_train.data.stream import BatchStream
    from student_train.loss.objective import Objective, attach
    from student_train.run.trainer import DistillTrainer

__all__ = ["BatchStream", "DistillTrainer", "Objective", "attach"]

_HOMES = {
    "BatchStream": "data.stream",
    "DistillTrainer": "run.trainer",
    "Objective": "loss.objective",
    "attach": "loss.objective",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that `--help` never waits for torch."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
