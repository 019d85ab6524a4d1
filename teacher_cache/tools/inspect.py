"""`cache-teacher inspect`: what a finished or unfinished cache holds. Never loads a teacher."""

import math
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shared.cache import Cache, open_cache
from shared.format.manifest import Manifest
from shared.models.tokenizer import load_cached_tokenizer
from shared.rows import Row
from shared.targets.ragged import drawn_logprob
from shared.targets.spec import TargetSpec
from teacher_cache.config import InspectConfig
from teacher_cache.job.statistics import HIDDEN_ERRORS, add, histogram, kept_masses
from teacher_cache.tasks.table import task_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACES_SHOWN, _CLASSES_SHOWN = 6, 6  # of a decoded row
_HISTOGRAM_BLOCKS = 16  # about 65,000 positions
_MISSING_LISTED = 20


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Provenance, completeness, sizes, kept mass, entropy and a few decoded rows."""
    cache = open_cache(config.cache, allow_partial=True)
    numbers = {
        **summary(cache),
        "rows_shown": _rows_shown(cache, config.rows),
    }
    if config.html is not None and cache.manifest.targets.distributions:
        numbers["histograms"] = histograms(cache)
    return numbers


def summary(cache: Cache) -> dict[str, Any]:
    """The numbers of a cache from its manifest and commits alone; no shard is opened."""
    manifest, commits = cache.manifest, cache.commits
    columns: Counter[str] = Counter()
    statistics: Counter[str] = Counter()
    for commit in commits:
        columns.update(commit.column_bytes)
        add(statistics, commit.statistics)
    positions = sum(commit.positions for commit in commits)
    size, per_position = sum(commit.num_bytes for commit in commits), 1 / max(1, positions)
    targets = sum(size for name, size in columns.items() if name.startswith("target_"))
    return {
        "cache_id": cache.cache_id,
        "format_version": manifest.format_version,
        "complete": not cache.missing_shards,
        "missing_shards": cache.missing_shards[:_MISSING_LISTED],
        "shards": len(commits),
        "num_shards": manifest.plan.num_shards,
        "rows": cache.num_rows,
        "tokens": sum(commit.tokens for commit in commits),
        "positions": positions,
        "bytes": size,
        "bytes_per_position": size * per_position,
        "target_bytes_per_position": targets * per_position,
        "column_bytes_per_position": {n: s * per_position for n, s in sorted(columns.items())},
        **_statistics(manifest, statistics, per_position),
        **_provenance(manifest),
    }


def _statistics(
    manifest: Manifest, statistics: Counter[str], per_position: float
) -> dict[str, Any]:
    """What the shards have counted and summed up, as means and counts."""
    mse = statistics["sum_value_squared_error"] * per_position
    loss = -statistics["sum_label_logprob"] * per_position
    return {
        "kept_mass": _kept_mass(statistics, per_position),
        "entries": statistics["sum_entries"] * per_position,  # of ragged kinds
        "hidden_error": {
            str(layer): _hidden_error(statistics, layer)
            for layer in manifest.hidden.layers
            if f"max_hidden_error.{layer}" in statistics
        },
        "entropy": statistics["sum_entropy"] * per_position,
        # A regression has this in place of entropy and log-probability.
        "teacher_mse": mse if manifest.targets.numbers and manifest.labelled else None,
        "teacher_loss": loss if manifest.labelled else None,
        "counters": {
            name: int(value)
            for name, value in statistics.items()
            if not name.startswith(("sum_", "max_"))
        },
    }


def _kept_mass(statistics: Counter[str], per_position: float) -> dict[str, float]:
    """Mean mass of the entries at each stored temperature."""
    masses = {}
    for name, value in sorted(statistics.items()):
        stem, _, temperature = name.partition(".")
        if stem == "sum_kept_mass":
            masses[temperature or "1"] = value * per_position
    return masses


def _hidden_error(statistics: Counter[str], layer: int) -> dict[str, float]:
    """By the length of the states: of all of them together, and of the worst one."""
    squared_error, squares, worst = (statistics[f"{name}.{layer}"] for name in HIDDEN_ERRORS)
    mean = math.sqrt(squared_error / squares) if squares else 0.0
    return {"mean": mean, "worst": worst}


def _provenance(manifest: Manifest) -> dict[str, Any]:
    fields = asdict(manifest)
    names = (
        "task",
        "problem_type",
        "teacher",
        "tokenizer",
        "corpus",
        "preprocessing",
        "targets",
        "hidden",
        "plan",
    )
    return {name: fields[name] for name in names}


def _spread(cache: Cache, count: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, cache.num_rows - 1, count)}) if count else []


def _rows_shown(cache: Cache, count: int) -> list[dict[str, Any]]:
    """Some rows as text; the tokenizer, which may take a second to load, is loaded once."""
    rows = cache[_spread(cache, count)]
    if not rows:
        return []
    tokenizer = load_cached_tokenizer(cache.storage)
    return [_decoded(cache, row, tokenizer) for row in rows]


def _decoded(cache: Cache, row: Row, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """One row as text, with the teacher's best classes at its first positions."""
    task = task_of(cache.manifest)
    shown: dict[str, Any] = {
        "row_id": row.row_id,
        "document": row.row_id >> 24,
        "tokens": len(row.input_ids),
        **task.shown(row, cache.manifest, tokenizer),
    }
    if row.targets is not None and task.shows_positions:
        shown["positions"] = [
            task.shown_around(row, int(row.positions[place]), tokenizer)
            | _said_at(place, row, cache.manifest, tokenizer)
            for place in range(min(_PLACES_SHOWN, len(row.positions)))
        ]
    return shown


def _said_at(
    place: int, row: Row, manifest: Manifest, tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, Any]:
    """What is right at a position of a row, and what the teacher says of it."""
    assert row.targets is not None  # _decoded has looked
    names, spec = manifest.labels, manifest.targets
    name_of = names.__getitem__ if names else lambda token: str(tokenizer.decode([token]))
    ids, logprobs = row.targets.entries(place)
    drawn = _drawn(logprobs, spec)
    rest = 1 - float(logprobs[~drawn].exp().sum())
    tail = max(0.0, rest) if spec.sampled else float(row.targets.tail_mass[place])
    best = logprobs.argsort(descending=True, stable=True)[:_CLASSES_SHOWN]
    return {
        "hard_label": name_of(int(row.labels[place])) if manifest.labelled else None,
        "teacher": [
            {
                "token": name_of(int(ids[slot])),
                "p": round(float(logprobs[slot].exp()), 4),
                "drawn": bool(drawn[slot]),
            }
            for slot in best.tolist()
        ],
        "entries": len(ids),
        # The tail of a sample is what its drawn entries stand for.
        "rest": "left to the drawn" if spec.sampled else "tail",
        "tail_mass": round(tail, 4),
    }


def _drawn(logprobs: Tensor, spec: TargetSpec) -> Tensor:
    """Which entries are there by chance, and not with their own probability."""
    if not spec.sampled:
        return torch.zeros_like(logprobs, dtype=torch.bool)
    return logprobs == float(drawn_logprob(spec))


def histograms(cache: Cache) -> dict[str, Any]:
    """Positions by entropy, by tail mass and by entries, of some blocks spread over the cache.

    The tail mass of a sample is that of all classes not kept as they are.
    """
    spec = cache.manifest.targets
    chosen = np.unique(np.linspace(0, cache.num_blocks - 1, _HISTOGRAM_BLOCKS).astype(int))
    blocks = [cache.read_block(number) for number in chosen.tolist()]
    entropy = np.concatenate([block.entropy for block in blocks if block.entropy is not None])
    targets = [block.target for block in blocks if block.target is not None]
    tail = np.concatenate([1 - kept_masses(target, spec, {})[1.0] for target in targets])
    step = math.log(spec.num_classes) / 255
    found = {
        "blocks": len(blocks),
        "positions": len(entropy),
        # 8 of the 256 stored steps in each bar: another number would draw a comb.
        "entropy": histogram(entropy, -step / 2, 255.5 * step, bars=32),
        "tail_mass": histogram(tail.clip(0, 1), 0, 1),
    }
    if spec.ragged:
        counts = np.concatenate([t.counts for t in targets if t.counts is not None])
        most = int(counts.max())
        found["entries"] = histogram(counts, 0.5, most + 0.5, bars=min(40, most))
    return found
