"""Several caches as one: their blocks one after another, for a cache and what was added to it.

A student run reads a `CacheSet`, of one cache or of many, or an `Ensemble` of teachers on the same
rows. Rows and blocks of a set are numbered through, in the order in which the caches were named.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from shared import compat
from shared.cache import Cache, open_cache
from shared.fit_rules import Side
from shared.format.blocks import Block
from shared.format.manifest import Manifest
from student_train.data.ensemble import Ensemble
from student_train.data.order import Part


class CacheSet:
    """Caches of the same tokenizer, task and kind of targets, read as one. Safe in threads.

    With `weights`, one for each cache, a run takes its tokens from the caches in this proportion.
    """

    def __init__(self, caches: Sequence[Cache], weights: Sequence[float] = ()) -> None:
        self.caches, self.weights = tuple(caches), tuple(weights)
        for other in self.caches[1:]:
            sides = (Side(str(cache.path), cache.manifest) for cache in (self.caches[0], other))
            compat.check("join", *sides)
        self.block_rows = np.concatenate([cache.block_rows for cache in self.caches])
        self.row_tokens = np.concatenate([cache.row_tokens for cache in self.caches])
        self.row_positions = np.concatenate([cache.row_positions for cache in self.caches])
        self.row_labels = self.row_positions  # the same memory where every position has a label
        if any(cache.manifest.hard_labels == "none" for cache in self.caches):
            self.row_labels = np.concatenate([cache.row_labels for cache in self.caches])
        self._starts = np.cumsum([0, *(cache.num_blocks for cache in self.caches)])
        self._columns = {name for cache in self.caches for name in cache.manifest.columns}

    @property
    def first(self) -> Cache:
        """The cache named first; its tokenizer and channel statistics serve for all."""
        return self.caches[0]

    @property
    def manifest(self) -> Manifest:
        return self.first.manifest

    @property
    def cache_ids(self) -> list[str]:
        return [cache.cache_id for cache in self.caches]

    @property
    def parts(self) -> list[Part]:
        """What `Order` mixes; empty where all blocks are one set."""
        pairs = zip(self.caches, self.weights, strict=bool(self.weights))
        return [Part(cache.num_blocks, weight) for cache, weight in pairs]

    def read_block(
        self,
        block: int,
        *,
        hidden_layers: Sequence[int] = (),
        targets: bool = True,
        skip: tuple[str, ...] = (),
    ) -> Block:
        """One decoded block, by its number in the set; as `Cache.read_block`."""
        index = int(np.searchsorted(self._starts, block, "right")) - 1
        number = block - int(self._starts[index])
        found = self.caches[index].read_block(
            number, hidden_layers=hidden_layers, targets=targets, skip=skip
        )
        return self._filled(found)

    def empty_block(self, *, hidden_layers: Sequence[int] = (), targets: bool = True) -> Block:
        """A block of no rows, as `Cache.empty_block`."""
        return self._filled(self.first.empty_block(hidden_layers=hidden_layers, targets=targets))

    def _filled(self, block: Block) -> Block:
        """The block with what other caches of the set store: where that is missing, a row is one
        segment of one text."""
        if "segments" in self._columns and block.segments is None:
            ones = np.ones(len(block.num_tokens), np.int32)
            block = replace(block, segments=block.num_tokens, num_segments=ones)
        if "token_type_ids" in self._columns and block.token_type_ids is None:
            block = replace(block, token_type_ids=np.zeros(len(block.input_ids), np.int32))
        return block

    def channel_deviation(self, layer: int) -> torch.Tensor:
        """Standard deviation of each channel of a stored layer, float32 [D]."""
        return self.first.channel_deviation(layer)


Source: TypeAlias = CacheSet | Ensemble


def open_caches(paths: Sequence[Path], *, allow_partial: bool) -> CacheSet:
    """Opens caches that can be trained on together."""
    return CacheSet([open_cache(path, allow_partial=allow_partial) for path in paths])
