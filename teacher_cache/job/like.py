"""`--like`: a job that keeps of new documents what an old cache has of others."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from shared.errors import CacheMismatch
from shared.format import manifest as manifests
from shared.format.manifest import Manifest
from shared.storage import Storage
from shared.targets.spec import TargetSpec
from teacher_cache.config import CaptureConfig
from teacher_cache.select.kinds import SELECTORS
from teacher_cache.tasks.table import TEACHER_TASKS

# What two caches must have alike to train together, whatever documents they are of.
_ALIKE = ("teacher", "tokenizer", "targets", "hidden", "problem_type", "labels")


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
    old: Storage, asked: Mapping[str, Any], *, reads_weights: bool
) -> tuple[TargetSpec, bytes | None]:
    """The targets of the old cache and its learnt file; refuses what would not train with it.

    A plan that reads no weights cannot say whose they are.
    """
    manifest, _ = manifests.read(old)
    fields = asdict(manifest)
    fields["targets"] = asked_targets(fields["targets"])
    names = [name for name in _ALIKE if reads_weights or name != "teacher"]
    lines = list(
        manifests.differences(
            {name: fields[name] for name in names}, {name: asked[name] for name in names}
        )
    )
    if lines:
        raise CacheMismatch(
            f"--like {old.root}: the new documents would not train together with it. "
            f"{'; '.join(lines)}."
        )
    learnt = [name for name in manifest.side_files if name.startswith("learnt-")]
    return manifest.targets, old.read(learnt[0]) if learnt else None


def asked_targets(targets: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for of a target spec: the threshold was found."""
    return {name: value for name, value in targets.items() if name != "threshold"}
