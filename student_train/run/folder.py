"""The folder of one student run: its config, the snapshot of its data, its log, its checkpoints.

OUT/run.yaml        the resolved config; a valid --config
OUT/snapshot.json   cache ids and the hash of every shard this run was started on
OUT/metrics.jsonl   one line per step, evaluation and speed reading
OUT/checkpoint-N/   state to go on from; `checkpoints.py` says when it is whole
OUT/status.json     of a run that is not finished: how its last start ended; `outcome.py`
OUT/result.json     numbers of the finished run; beside it the model itself
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.cache import Cache, open_cache
from shared.errors import CacheMismatch, CorruptCache, CorruptRun
from shared.format.manifest import differences
from shared.options import resolved, write_resolved
from shared.storage.local import LocalStorage
from student_train.config import TrainConfig
from student_train.data.cache_set import CacheSet, Source
from student_train.data.ensemble import Ensemble
from student_train.run_files import (
    CONFIG,
    METRICS,
    RESULT,
    SNAPSHOT,
    CacheSnapshot,
    read_metrics,
    read_options,
    read_result,
    read_snapshot,
)

log = logging.getLogger(__name__)

# A resumed run may change these: they do not change which numbers a step computes.
FREE_TO_CHANGE = frozenset(
    {
        "cache",
        "validation_cache",
        "out",
        "max_steps",
        "epochs",
        "eval_every",
        "save_every",
        "log_every",
        "keep_checkpoints",
        "early_stopping_patience",
        "micro_batch_tokens",
        "threads",
        "report_to",
        "device",
        "compile",
        "gradient_checkpointing",
        "allow_partial",
    }
)


class RunFolder:
    """Reads and writes the files of a run; a second start must ask for the same run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.storage = LocalStorage(path)

    def open_caches(self, config: TrainConfig) -> Source:
        """The caches of this run: as they are at the first start, later as they were then.

        Writes nothing, so that a run which is refused leaves nothing behind.
        """
        if not self.storage.exists(SNAPSHOT):
            self._check_free()
            partial = config.allow_partial
            caches = [open_cache(path, allow_partial=partial) for path in config.cache_paths]
            return _assembled(caches, config)
        self._check_same(config)
        before = read_snapshot(self.storage)
        caches = [open_cache(path, allow_partial=True) for path in config.cache_paths]
        self._check_same_caches(before, _snapshot(caches, config.cache_weights))
        pairs = zip(caches, before, strict=True)
        return _assembled([cache.restrict(each.shards) for cache, each in pairs], config)

    def _check_same_caches(
        self, before: Sequence[CacheSnapshot], now: Sequence[CacheSnapshot]
    ) -> None:
        """Refuses other caches, weights or another order than before; caches may have moved."""
        ids, other_ids = ([each.cache_id for each in caches] for caches in (before, now))
        if ids != other_ids:
            raise CacheMismatch(
                f"{self.path}: this run was started on cache {_short(ids)}, but now named is "
                f"{_short(other_ids)}. Name the same caches, or start a new run with another --out."
            )
        weights, other_weights = (
            ["no weight" if each.weight is None else each.weight for each in caches]
            for caches in (before, now)
        )
        if weights != other_weights:
            raise CacheMismatch(
                f"{self.path}: this folder holds another run. Weights of the caches: this run has "
                f"{', '.join(map(str, weights))}, asked for {', '.join(map(str, other_weights))}. "
                "Choose another --out, or ask for the same run to go on with it."
            )

    def _check_free(self) -> None:
        if is_main_process() and self.path.is_dir() and any(self.path.iterdir()):
            raise CacheMismatch(
                f"{self.path}: this folder is not empty and holds no run. Nothing is overwritten: "
                "choose another --out."
            )

    def start(self, config: TrainConfig, caches: Source) -> None:
        """Writes config and snapshot at the first start; a later one changes nothing."""
        if self.storage.exists(SNAPSHOT) or not is_main_process():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        write_resolved(config, self.path / CONFIG)
        caches_now = [asdict(each) for each in _snapshot(caches.caches, config.cache_weights)]
        self.storage.put(SNAPSHOT, json.dumps({"caches": caches_now}, indent=1).encode())

    def _check_same(self, config: TrainConfig) -> None:
        before, now = read_options(self.storage), resolved(config)
        free = FREE_TO_CHANGE
        if config.uses_hidden_loss and config.hidden_loss == "contrastive":
            free -= {"micro_batch_tokens"}  # a row is compared with the others of its micro-batch
        found, asked = (
            {key: value for key, value in options.items() if key not in free}
            for options in (before, now)
        )
        lines = list(differences(found, asked, left="this run has"))
        if lines:
            raise CacheMismatch(
                f"{self.path}: this folder holds another run. {'; '.join(lines)}. Choose another "
                "--out, or ask for the same run to go on with it."
            )

    def result(self, max_steps: int) -> dict[str, Any] | None:
        """The numbers of the run if it is finished, for at least that many steps."""
        if not self.storage.exists(RESULT):
            return None
        result = read_result(self.storage)
        return result if result["max_steps"] >= max_steps else None

    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint; a damaged one is passed over with a warning."""
        from student_train.run import (
            checkpoints,  # imports transformers, which `compare` never needs
        )

        found = [path for path in self.path.glob("checkpoint-*") if path.name[11:].isdecimal()]
        for path in sorted(found, key=lambda path: int(path.name[11:]), reverse=True):
            try:
                checkpoints.check(path)
            except (CorruptRun, CorruptCache) as error:
                log.warning(
                    "%s: incomplete or damaged, going back to the one before. %s", path, error
                )
            else:
                return path
        if found:
            log.warning(
                "%s: none of its checkpoints can be used, so the run starts again at step 0",
                self.path,
            )
        return None

    def trim_metrics(self, step: int) -> None:
        """Drops lines of steps after `step`, which will be trained again."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        self.storage.put(METRICS, "".join(f"{json.dumps(line)}\n" for line in kept).encode())

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line cut short by a crash is left out."""
        return read_metrics(self.path / METRICS)

    def before(self, validation_cache_id: str) -> dict[str, Any] | None:
        """The student's numbers on this held-out cache before the first step, once they are known.

        A resumed run may name another held-out cache, on which nobody looked at that student.
        """
        for line in self.metrics():
            first = line["kind"] == "eval" and line["step"] == 0
            if first and line.get("validation_cache_id") == validation_cache_id:
                outside = ("kind", "step", "validation_cache_id")
                return {name: value for name, value in line.items() if name not in outside}
        return None

    def seconds(self) -> float:
        """Seconds of training that the log accounts for so far."""
        return sum(line["seconds"] for line in self.metrics() if line["kind"] == "speed")

    def save_result(self, numbers: Mapping[str, Any]) -> None:
        self.storage.put(RESULT, json.dumps(numbers, indent=1).encode())


def _assembled(caches: Sequence[Cache], config: TrainConfig) -> Source:
    """One set of rows, or one ensemble of teachers."""
    if config.ensemble:
        return Ensemble(
            caches,
            config.cache_weights,
            temperature=config.temperature,
            hidden_layers=caches[0].manifest.hidden.layers if config.uses_hidden_loss else (),
        )
    return CacheSet(caches, config.cache_weights)


def _snapshot(caches: Sequence[Cache], weights: Sequence[float]) -> list[CacheSnapshot]:
    each: Sequence[float | None] = weights or [None] * len(caches)
    pairs = zip(caches, each, strict=True)
    return [CacheSnapshot(cache.cache_id, cache.snapshot(), weight) for cache, weight in pairs]


def is_main_process() -> bool:
    """Rank 0 writes; before the process group exists the launcher's variable says who that is."""
    return os.environ.get("RANK", "0") == "0"


def _short(cache_ids: list[str]) -> str:
    return ", ".join(cache_id[:12] for cache_id in cache_ids)
