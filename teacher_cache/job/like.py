"""`--like`: a job that keeps of new documents what an old cache has of others."""

from dataclasses import replace
from typing import Any

from shared import compat
from shared.fit_rules import Side
from shared.format.manifest import Manifest
from shared.storage.base import Storage
from teacher_cache.config import CaptureConfig
from teacher_cache.select.kinds import SELECTORS
from teacher_cache.tasks.table import TEACHER_TASKS


def as_in(config: CaptureConfig, old: Manifest) -> CaptureConfig:
    """The options with those of the old cache that decide whether two caches train together."""
    rows, hidden = old.preprocessing, old.hidden
    target_length = config.max_target_length if config.generate else rows.max_target_length
    options: dict[str, Any] = {
        "like": None,
        "problem_type": "auto",
        "temperature": old.targets.temperatures,
        "hidden_layers": hidden.layers,
        "hidden_codec": hidden.codec,
        "hidden_every": hidden.every,
        "pooling": "auto",
        "max_length": rows.max_length,
        "max_target_length": target_length,
        "stride": rows.stride,
        "pack": rows.pack,
        "decoder_start": rows.decoder_start if rows.decoder_start >= 0 else "auto",
    }
    options |= SELECTORS[old.targets.kind].options_like(old.targets)
    options |= TEACHER_TASKS[config.task].options_like(old)
    return replace(config, **options)


def check_alike(old: Storage, manifest: Manifest, asked: Manifest, *, reads_weights: bool) -> None:
    """Refuses new documents that would not train together with the old cache.

    A plan that reads no weights cannot say whose they are.
    """
    if not reads_weights:
        asked = replace(asked, teacher=manifest.teacher)
    compat.check("like", Side(str(old.root), manifest), Side("the new documents", asked))


def learnt_by(old: Storage, manifest: Manifest) -> bytes | None:
    """What the old cache learnt, if anything."""
    names = [name for name in manifest.side_files if name.startswith("learnt-")]
    return old.read(names[0]) if names else None
