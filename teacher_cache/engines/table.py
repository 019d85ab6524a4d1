"""Every engine that can run a teacher: one line each."""

from teacher_cache.engines.base import LoadEngine
from teacher_cache.engines.hf import TransformersEngine

ENGINES: dict[str, LoadEngine] = {
    "transformers": TransformersEngine.load,
}
DEFAULT_ENGINE = "transformers"
