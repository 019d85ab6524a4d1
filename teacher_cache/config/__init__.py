"""The options of every `cache-teacher` command, each declared once: one class for one concern.

What a job does with its options stands elsewhere; here is what they are, and which go together.
"""

from teacher_cache.config.capture import CaptureConfig, PlanConfig
from teacher_cache.config.tools import (
    CheckConfig,
    CleanConfig,
    InspectConfig,
    RepackConfig,
    StudentConfig,
    VerifyConfig,
)

__all__ = [
    "CaptureConfig",
    "CheckConfig",
    "CleanConfig",
    "InspectConfig",
    "PlanConfig",
    "RepackConfig",
    "StudentConfig",
    "VerifyConfig",
]
