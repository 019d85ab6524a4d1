"""A short way to train: `train(...)` runs stage two in this process on the shared cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from student_train.config import TrainConfig
from student_train.run.run import run

Train = Callable[..., dict[str, Any]]


@pytest.fixture
def train(cache_dir: Path, student_config_dir: Path, tmp_path: Path) -> Train:
    """Trains a student; keyword arguments are options of TrainConfig."""

    def make(**options: Any) -> dict[str, Any]:
        defaults: dict[str, Any] = {
            "student": str(student_config_dir),
            "cache": (cache_dir,),
            "out": tmp_path / "run",
            "max_steps": 6,
            "batch_tokens": 1000,
            "learning_rate": 3e-3,
            "log_every": 2,
            "device": "cpu",
        }
        return run(TrainConfig(**defaults | options))

    return make
