"""The folder of one student run: its config, the snapshot of its data, its log, its checkpoints.

OUT/run.yaml        the resolved config; a valid --config
OUT/snapshot.json   cache ids and the hash of every shard this run was started on
OUT/metrics.jsonl   one line per step, evaluation and speed reading
OUT/checkpoint-N/   state to go on from, complete when it holds trainer_state.json
OUT/result.json     numbers of the finished run; beside it the model itself
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from shared.cache import Cache, open_cache
from shared.errors import CacheMismatch, CorruptCache
from shared.manifest import differences
from shared.options import resolved, write_resolved
from shared.storage import Storage
from student_train.cache_set import CacheSet, Source
from student_train.config import TrainConfig
from student_train.ensemble import Ensemble

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
        "early_stopping_metric",
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
        self.storage = Storage(path)

    def open_caches(self, config: TrainConfig) -> Source:
        """The caches of this run: as they are at the first start, later as they were then.

        Writes nothing, so that a run which is refused leaves nothing behind.
        """
        if not self.storage.exists("snapshot.json"):
            self._check_free()
            partial = config.allow_partial
            caches = [open_cache(path, allow_partial=partial) for path in config.cache_paths]
            return _assembled(caches, config)
        self._check_same(config)
        snapshot = json.loads(self.storage.read("snapshot.json"))["caches"]
        caches = [open_cache(path, allow_partial=True) for path in config.cache_paths]
        self._check_same_caches(snapshot, _snapshot(caches, config.cache_weights))
        pairs = zip(caches, snapshot, strict=True)
        return _assembled([cache.restrict(each["shards"]) for cache, each in pairs], config)

    def _check_same_caches(
        self, before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]
    ) -> None:
        """The same caches with the same weights, in the same order; they may have moved."""
        ids, other_ids = ([each["cache_id"] for each in caches] for caches in (before, now))
        if ids != other_ids:
            raise CacheMismatch(
                f"{self.path}: this run was started on cache {_short(ids)}, but now named is "
                f"{_short(other_ids)}. Name the same caches, or start a new run with another --out."
            )
        weights, other_weights = (
            [each.get("weight", "no weight") for each in caches] for caches in (before, now)
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
        if self.storage.exists("snapshot.json") or not is_main_process():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        write_resolved(config, self.path / "run.yaml")
        snapshot = {"caches": _snapshot(caches.caches, config.cache_weights)}
        self.storage.put("snapshot.json", json.dumps(snapshot, indent=1).encode())

    def _check_same(self, config: TrainConfig) -> None:
        before = yaml.safe_load(self.storage.read("run.yaml")) or {}
        now = resolved(config)
        found, asked = (
            {key: value for key, value in options.items() if key not in FREE_TO_CHANGE}
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
        if not self.storage.exists("result.json"):
            return None
        result = json.loads(self.storage.read("result.json"))
        return result if result["max_steps"] >= max_steps else None

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint; one cut short is passed over with a warning."""
        found = [path for path in self.path.glob("checkpoint-*") if path.name[11:].isdigit()]
        for path in sorted(found, key=lambda path: int(path.name[11:]), reverse=True):
            if _complete(path):
                return path
            log.warning("%s: incomplete or damaged, going back to the one before", path)
        return None

    def trim_metrics(self, step: int) -> None:
        """Drops lines of steps after `step`, which will be trained again."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        self.storage.put(
            "metrics.jsonl", "".join(f"{json.dumps(line)}\n" for line in kept).encode()
        )

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line cut short by a crash is left out."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                log.warning("%s: a broken line is left out", path)

    def seconds(self) -> float:
        """Seconds of training that the log accounts for so far."""
        return sum(line["seconds"] for line in self.metrics() if line["kind"] == "speed")

    def save_result(self, numbers: Mapping[str, Any]) -> None:
        self.storage.put("result.json", json.dumps(numbers, indent=1).encode())


def _assembled(caches: Sequence[Cache], config: TrainConfig) -> Source:
    """One set of rows, or one ensemble of teachers."""
    if config.ensemble:
        return Ensemble(
            caches,
            config.cache_weights,
            temperature=config.temperature,
            hidden_layers=[layer for layer, _ in config.layer_pairs],
        )
    return CacheSet(caches, config.cache_weights)


def _snapshot(caches: Sequence[Cache], weights: Sequence[float]) -> list[dict[str, Any]]:
    """Cache id, shard hashes and, where there is one, weight of each cache."""
    found: list[dict[str, Any]] = [
        {"cache_id": cache.cache_id, "shards": cache.snapshot()} for cache in caches
    ]
    for each, weight in zip(found, weights, strict=bool(weights)):
        each["weight"] = weight
    return found


def kl_of(numbers: Mapping[str, Any]) -> float | None:
    """The KL to the teacher, whole or over the kept classes; None without targets."""
    return numbers.get("kl", numbers.get("kl_bucketed"))


def is_main_process() -> bool:
    """Rank 0 writes; before the process group exists the launcher's variable says who that is."""
    return os.environ.get("RANK", "0") == "0"


def _short(cache_ids: list[str]) -> str:
    return ", ".join(cache_id[:12] for cache_id in cache_ids)


def _complete(checkpoint: Path) -> bool:
    """trainer_state.json is written last; the weights must at least have a readable header."""
    from safetensors import SafetensorError, safe_open

    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        for weights in checkpoint.glob("*.safetensors"):
            with safe_open(weights, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError, CorruptCache):
        return False
    return True
