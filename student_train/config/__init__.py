"""The options of every `train-student` command, each declared once: one class for one concern.

What a run does with its options stands elsewhere; here is what they are, and which go together.
"""

from student_train.config.adapters import AdapterSpec
from student_train.config.tools import (
    CompareConfig,
    EvaluateConfig,
    ExportConfig,
    ExportFormat,
    StatusConfig,
    WorstBy,
)
from student_train.config.train import TrainConfig

__all__ = [
    "AdapterSpec",
    "CompareConfig",
    "EvaluateConfig",
    "ExportConfig",
    "ExportFormat",
    "StatusConfig",
    "TrainConfig",
    "WorstBy",
]
