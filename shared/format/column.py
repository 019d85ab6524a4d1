"""What a column of a shard is: its description, when a cache has it, its planes, its coding."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from shared.arrays import Plane
from shared.format.blocks import Block
from shared.format.coding import Coding, Context
from shared.format.manifest import Manifest
from shared.targets.planes import Per


@dataclass(frozen=True, slots=True)
class PlaneSpec:
    """One Arrow column: a byte plane of a column, and its bytes for each row, token, entry, ...

    A state is a position with hidden states: each, or every n-th of a row.
    """

    column: str
    plane: int
    number: int
    per: Per
    item_bytes: int

    @property
    def name(self) -> str:
        return f"{self.column}.{self.plane}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a cache holds of its rows and of a teacher; its columns follow.

    `targets` are distributions over classes. What is absent follows the task's default.
    """

    segments: bool
    positions: bool
    labels: bool
    targets: bool
    label_values: bool = False
    label_logprob: bool = True
    token_types: bool = False
    references: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """One column of format 1; `number` goes into the header of each of its frames.

    `coding`: how its field of the same name in a block is written; none where a kind of target
    writes several columns together. `present`: when a manifest lists it; none where it follows from
    the targets or the hidden states. `source`: whether it is read from the corpus, is in the commit
    as well (which is believed), is said by the teacher, or is the teacher's states. `counted_by`:
    the column that says how many items each row has, where the commit does not.
    """

    name: str
    number: int
    dtype: str
    per: Per
    unit: str
    meaning: str
    coding: Coding | None = None
    present: Callable[[Contents], bool] | None = None
    source: Literal["corpus", "commit", "teacher", "states"] = "corpus"
    counted_by: str = ""
    needs_labels: bool = False

    def planes(self, manifest: Manifest) -> Iterator[PlaneSpec]:
        """The planes that this cache has of it, but for what a kind of target writes."""
        if self.coding is None:
            return
        for index, (suffix, sizes) in enumerate(self.coding.item_bytes(manifest).items()):
            for plane, item_bytes in enumerate(sizes):
                number = self.number + index
                yield PlaneSpec(self._named(suffix), plane, number, self.per, item_bytes)

    def encode(self, block: Block, context: Context) -> dict[str, Plane]:
        """Its planes by name; none where the block lacks it."""
        if self.coding is None or (value := getattr(block, self.name)) is None:
            return {}
        return {
            f"{self._named(suffix)}.{number}": plane
            for suffix, planes in self.coding.encode(value, context).items()
            for number, plane in enumerate(planes)
        }

    def decode(self, values: Mapping[str, np.ndarray], context: Context) -> Any:
        """The value of its field in a block; None where no plane of it was read."""
        if self.coding is None:
            return None
        suffixes = self.coding.item_bytes(context.manifest)
        planes = {suffix: _parts(values, self._named(suffix)) for suffix in suffixes}
        there = {suffix: parts for suffix, parts in planes.items() if parts}
        return self.coding.decode(there, context) if there else None

    def _named(self, suffix: str) -> str:
        return f"{self.name}.{suffix}" if suffix else self.name


def _parts(values: Mapping[str, np.ndarray], column: str) -> list[np.ndarray]:
    parts: list[np.ndarray] = []
    while (name := f"{column}.{len(parts)}") in values:
        parts.append(values[name])
    return parts
