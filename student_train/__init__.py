"""Stage two: streams a cache into a training loop; never loads a teacher."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared.cache import open_cache
    from student_train.data.stream import BatchStream
    from student_train.loss.attachment import attach
    from student_train.loss.objective import Objective
    from student_train.run.trainer import DistillTrainer

__all__ = ["BatchStream", "DistillTrainer", "Objective", "attach", "open_cache"]

_HOMES = {
    "BatchStream": "student_train.data.stream",
    "DistillTrainer": "student_train.run.trainer",
    "Objective": "student_train.loss.objective",
    "attach": "student_train.loss.attachment",
    "open_cache": "shared.cache",
}


def _refuse_a_foreign_shared() -> None:
    """Imports would take another folder named `shared` for ours, and fail deep inside."""
    home = Path(__file__).resolve().parents[1]
    found = find_spec("shared")
    if found is None:
        return  # the import itself says so
    if found.origin and Path(found.origin).resolve() == home / "shared" / "__init__.py":
        return
    foreign = found.origin or ", ".join(found.submodule_search_locations or ())
    raise ImportError(
        f"{__name__} needs the package `shared` in {home}, but Python finds another one of that "
        f"name first: {foreign}. With -m it looks into the current folder first: start "
        "`train-student` instead (under torchrun `torchrun --no-python train-student ...`), set "
        "PYTHONSAFEPATH=1, or start from another folder. In a program of your own, "
        f"rename the other package, or put {home} in front of its folder on sys.path.",
        name=__name__,  # so named, `python -m` shows the message alone, without a traceback
    )


_refuse_a_foreign_shared()


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that `--help` never waits for torch."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
