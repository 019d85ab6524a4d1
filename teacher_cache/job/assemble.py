"""Rows become blocks: what is compressed, checked and read as one.

R rows of a block, P positions of all of them.
"""

import json
from collections.abc import Iterator, Sequence

import numpy as np

from shared.format.blocks import Block
from shared.format.schema import MIN_BLOCK_POSITIONS
from teacher_cache.select.window import WindowTargets
from teacher_cache.tasks.rows import TrainingRow


def cut_blocks(built: Iterator[TrainingRow]) -> Iterator[list[TrainingRow]]:
    """Consecutive rows, together MIN_BLOCK_POSITIONS; the last block of a shard may be less."""
    block: list[TrainingRow] = []
    positions = 0
    for row in built:
        block.append(row)
        positions += row.num_positions
        if positions >= MIN_BLOCK_POSITIONS:
            yield block
            block, positions = [], 0
    if block:
        yield block


def assemble(
    window: Sequence[TrainingRow],
    kept: Sequence[int],
    targets: WindowTargets | None,
    columns: Sequence[str],
) -> Block:
    """The rows `kept` of a window as a block with these columns, and with their targets."""
    chosen = [window[index] for index in kept]
    labels = _joined([row.labels for row in chosen if row.labels is not None])
    of_values = "label_values" in columns
    block = Block(
        row_ids=np.array([row.row_id for row in chosen], np.uint64),
        num_tokens=np.array([len(row.input_ids) for row in chosen], np.int32),
        num_positions=np.array([row.num_positions for row in chosen], np.int32),
        input_ids=np.concatenate([row.input_ids for row in chosen]),
        positions=np.concatenate([row.positions() for row in chosen]).astype(np.int32),
        labels=None if of_values else labels,
        label_values=labels if of_values else None,
        token_type_ids=_joined([_types(row) for row in chosen]),
    )
    if "reference" in columns:
        texts = [json.dumps(row.reference, ensure_ascii=False).encode() for row in chosen]
        block.reference = np.frombuffer(b"".join(texts), np.uint8)
        block.reference_bytes = np.array([len(text) for text in texts], np.int32)
    if "segments" in columns:
        block.segments = np.array([size for row in chosen for size in row.segments], np.int32)
        block.num_segments = np.array([len(row.segments) for row in chosen], np.int32)
    if targets is not None:
        targets.fill(block, kept)
    if "label_logprob" not in columns:  # of no label there is none
        block.label_logprob = None
    return block


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray | None:
    return np.concatenate(parts) if parts else None


def _types(row: TrainingRow) -> np.ndarray:
    """All 0 where a row is one text; written only where the cache has pairs."""
    return np.zeros_like(row.input_ids) if row.token_type_ids is None else row.token_type_ids
