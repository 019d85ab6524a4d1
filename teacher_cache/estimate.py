"""`cache-teacher plan`: what a job will cost, before any GPU hour.

Counts come from a sample of documents spread over the corpus. Bytes for each k come from a table
measured on a strong teacher's distributions, or, with --calibrate, from encoding what this teacher
says about this corpus; then the kept mass, the hours and the disk speed are measured too.
"""

import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared import frames
from shared.codec import encode
from shared.schema import MIN_BLOCK_POSITIONS, bytes_for
from shared.target import ClassRanks, Target, TargetSpec
from teacher_cache import plan
from teacher_cache.batches import forward_batches
from teacher_cache.config import PlanConfig
from teacher_cache.plan import Draft, Sample
from teacher_cache.rows import Row
from teacher_cache.targets import select
from teacher_cache.teacher import Teacher

_KS = (8, 16, 32, 64, 128)
# bytes/position of all target columns at 7 bits and 151,936 classes: benchmarks/README.md.
# A strong teacher's candidates are less driven by frequency, so a quarter is added.
_TABLE = {8: 18.0, 16: 31.0, 32: 56.0, 64: 104.0, 128: 196.0}
_ALLOWANCE = 1.25
# bytes of a channel of a hidden state, compressed: benchmarks/README.md
_CHANNEL_BYTES = {"bf16": 1.4, "fp8": 0.85, "int8": 1.0}
_PROBE_BYTES = 64 << 20
_CALIBRATE_TOKENS = 1 << 15


@dataclass(frozen=True, slots=True)
class _Measured:
    tokens_per_s: float
    kept_mass: dict[str, dict[str, float]]
    bytes_per_position: dict[str, float]


def estimate(config: PlanConfig) -> dict[str, Any]:
    """Documents, rows, tokens, positions, shards; bytes for each k; hours where calibrated."""
    draft = plan.resolve(config, load_teacher=config.calibrate)
    sample = plan.sample_corpus(draft)
    scale = len(draft.corpus) / sample.documents
    per_shard = plan.documents_per_shard(draft, sample)
    positions = sample.positions * scale
    measured = None
    if config.calibrate and draft.teacher is not None:
        measured = _measure(draft, draft.teacher, sample)
    per_position = _bytes_per_position(draft, measured)
    other = 1.6 * bytes_for(draft.tokenizer_info.num_ids - 1) / 2 + 3.5
    chosen = (
        per_position.get(str(draft.targets.top_k), 0.0) if draft.targets.kind != "none" else 0.0
    )
    hidden = sum(draft.hidden.widths) * _CHANNEL_BYTES[draft.hidden.codec] / draft.hidden.every
    total = positions * (chosen + other + hidden)
    free = shutil.disk_usage(_existing(config.out)).free
    numbers: dict[str, Any] = {
        "documents": len(draft.corpus),
        "sampled_documents": sample.documents,
        "rows": round(len(sample.rows) * scale),
        "tokens": round(sample.tokens * scale),
        "positions": round(positions),
        "documents_per_shard": per_shard,
        "shards": -(-len(draft.corpus) // per_shard),
        "counters": dict(sample.counters),
        "classes": draft.targets.num_classes,
        "targets": draft.targets.kind,
        "top_k": draft.targets.top_k if draft.targets.kind != "none" else 0,
        "target_bytes_per_position": per_position,
        "other_bytes_per_position": round(other + hidden, 1),
        "bytes": round(total),
        "free_bytes": free,
        "enough_space": free >= 1.1 * total,
        "calibrated": measured is not None,
    }
    if measured is not None:
        numbers["tokens_per_s"] = round(measured.tokens_per_s)
        numbers["hours"] = sample.tokens * scale / measured.tokens_per_s / 3600
        numbers["kept_mass"] = measured.kept_mass
        numbers["disk_mb_per_s"] = round(_disk_speed(_existing(config.out)) / 1e6)
    return numbers


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def _bytes_per_position(draft: Draft, measured: _Measured | None) -> dict[str, float]:
    if draft.targets.kind == "none":
        return {}
    if measured is not None:
        return measured.bytes_per_position
    wanted = sorted({*_KS, draft.targets.top_k})
    ks, sizes = np.array(list(_TABLE)), np.array(list(_TABLE.values()))
    values = np.interp(np.log(wanted), np.log(ks), sizes / ks) * wanted * _ALLOWANCE
    return {str(k): round(float(v), 1) for k, v in zip(wanted, values, strict=True)}


def _measure(draft: Draft, teacher: Teacher, sample: Sample) -> _Measured:
    """Runs the teacher over part of the sample, keeping the most entries that any k asks for."""
    chosen: list[Row] = []
    tokens = 0
    for row in sample.rows:
        chosen.append(row)
        tokens += len(row.input_ids)
        if tokens >= _CALIBRATE_TOKENS:
            break
    most = min(draft.targets.num_classes, max(*_KS, draft.targets.top_k))
    spec = replace(draft.targets, top_k=most)
    forward_tokens = draft.config.forward_tokens
    size = plan.default_forward_tokens(teacher) if forward_tokens == "auto" else forward_tokens
    parts: list[tuple[torch.Tensor, ...]] = []
    started = time.perf_counter()
    for batch in forward_batches(chosen, size, packed=draft.preprocessing.pack):
        for _, logits in teacher.forward(batch.inputs, ()).chunks:
            got = select(logits, spec)
            ratios = [got.log_partition_ratio[t].cpu() for t in spec.temperatures]
            parts.append((got.ids.cpu(), got.logprobs.cpu(), *ratios))
    seconds = time.perf_counter() - started
    ids, logprobs, *ratios = (torch.cat(column) for column in zip(*parts, strict=True))
    wanted = sorted({k for k in (*_KS, draft.targets.top_k) if k <= most})
    kept = {
        "1": {str(k): float(logprobs[:, :k].exp().sum(1).mean()) for k in wanted},
        **{
            f"{t:g}": {
                str(k): float((logprobs[:, :k] / t - r[:, None]).exp().sum(1).mean())
                for k in wanted
            }
            for t, r in zip(spec.temperatures, ratios, strict=True)
        },
    }
    sizes = {str(k): _encoded_bytes(ids[:, :k], logprobs[:, :k], spec, k) for k in wanted}
    return _Measured(tokens / seconds, kept, sizes)


def _encoded_bytes(ids: torch.Tensor, logprobs: torch.Tensor, spec: TargetSpec, k: int) -> float:
    """Bytes per position of the second half, with class ranks learnt on the first one."""
    half = len(ids) // 2
    counts = np.bincount(ids[:half].reshape(-1).numpy(), minlength=spec.num_classes)
    ranks, spec = ClassRanks.from_counts(counts), replace(spec, top_k=k)
    size = 0
    for start in range(half, len(ids), MIN_BLOCK_POSITIONS):
        block = slice(start, start + MIN_BLOCK_POSITIONS)
        part = logprobs[block]
        tail = torch.log1p(-part.exp().sum(1).clamp(max=1 - 1e-7))
        target = Target(
            ids=ids[block].to(torch.int32).numpy(), logprobs=part.numpy(), log_tail=tail.numpy()
        )
        for plane in encode(target, spec, ranks).values():
            size += len(frames.compress(plane, block=0, column=0))
    return round(size / max(1, len(ids) - half), 1)


def _disk_speed(folder: Path) -> float:
    """Bytes per second of writing and flushing 64 MiB beside the cache."""
    probe = folder / f".tmp.probe.{os.getpid()}"
    data = os.urandom(_PROBE_BYTES)
    try:
        started = time.perf_counter()
        with open(probe, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return _PROBE_BYTES / (time.perf_counter() - started)
    finally:
        probe.unlink(missing_ok=True)
