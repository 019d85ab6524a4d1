"""`--like`: a job that keeps of new documents what an old cache has of others."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from shared import compat
from shared.fit_rules import Side
from shared.format import manifest as manifests
from shared.format.manifest import Manifest
from shared.storage import Storage
from shared.targets.spec import TargetSpec
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


def learnt_by(
    old: Storage, asked_of: Callable[[Manifest], Manifest], *, reads_weights: bool
) -> tuple[TargetSpec, bytes | None]:
    """The targets of the old cache and its learnt file; refuses what would not train with it.

    A plan that reads no weights cannot say whose they are.
    """
    manifest, _ = manifests.read(old)
    asked = asked_of(manifest)
    if not reads_weights:
        asked = replace(asked, teacher=manifest.teacher)
    compat.check("like", Side(str(old.root), manifest), Side("the new documents", asked))
    learnt = [name for name in manifest.side_files if name.startswith("learnt-")]
    return manifest.targets, old.read(learnt[0]) if learnt else None
