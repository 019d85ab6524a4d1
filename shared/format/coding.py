"""How one column of a block becomes byte planes and back: one object a way, for `schema.COLUMNS`.

Planes are flat uint8 arrays. A column is an array of the block; or a dictionary of arrays, where
there is one column of this kind for each temperature or layer, told apart by a suffix.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.arrays import Plane, join_planes, split_planes
from shared.format.manifest import Manifest
from shared.targets import hidden, scalars
from shared.targets.hidden import ChannelScales
from shared.targets.record import ClassRanks


@dataclass(frozen=True, slots=True)
class Context:
    """What the planes of a cache are written and read with; int8 states need their `scales`."""

    manifest: Manifest
    ranks: ClassRanks
    scales: ChannelScales


class Coding(ABC):
    """One way to write a column."""

    @abstractmethod
    def item_bytes(self, manifest: Manifest) -> Mapping[str, Sequence[int]]:
        """Bytes of an item in each plane, of each column by its suffix (`""`: it has none)."""

    @abstractmethod
    def encode(self, value: Any, context: Context) -> Mapping[str, Sequence[Plane]]:
        """The planes of each column by its suffix."""

    @abstractmethod
    def decode(self, planes: Mapping[str, Sequence[Plane]], context: Context) -> Any:
        """The inverse of encode, of the columns that were read."""


@dataclass(frozen=True, slots=True)
class WholeNumbers(Coding):
    """One plane of numbers as they are, `stored` on the disk and `decoded` in memory."""

    stored: str
    decoded: type[np.generic]

    def item_bytes(self, manifest: Manifest) -> Mapping[str, Sequence[int]]:
        return {"": [np.dtype(self.stored).itemsize]}

    def encode(self, value: np.ndarray, context: Context) -> Mapping[str, Sequence[Plane]]:
        return {"": [np.ascontiguousarray(value, self.stored).view(np.uint8)]}

    def decode(self, planes: Mapping[str, Sequence[Plane]], context: Context) -> np.ndarray:
        return planes[""][0].view(self.stored).astype(self.decoded, copy=False)


@dataclass(frozen=True, slots=True)
class Unsigned(Coding):
    """As many planes of one byte as the largest number that the manifest allows needs; i32."""

    largest: Callable[[Manifest], int]

    def item_bytes(self, manifest: Manifest) -> Mapping[str, Sequence[int]]:
        return {"": [1] * bytes_for(self.largest(manifest))}

    def encode(self, value: np.ndarray, context: Context) -> Mapping[str, Sequence[Plane]]:
        planes = bytes_for(self.largest(context.manifest))
        return {"": split_planes(value.astype(np.uint32), planes)}

    def decode(self, planes: Mapping[str, Sequence[Plane]], context: Context) -> np.ndarray:
        return join_planes(planes[""], np.uint32).view(np.int32)


class Bytes(Coding):
    """One plane that is the column itself."""

    def item_bytes(self, manifest: Manifest) -> Mapping[str, Sequence[int]]:
        return {"": [1]}

    def encode(self, value: np.ndarray, context: Context) -> Mapping[str, Sequence[Plane]]:
        return {"": [value]}

    def decode(self, planes: Mapping[str, Sequence[Plane]], context: Context) -> np.ndarray:
        return planes[""][0]


@dataclass(frozen=True, slots=True)
class Values(Coding):
    """Finite float32 numbers, exact."""

    column: str

    def item_bytes(self, manifest: Manifest) -> Mapping[str, Sequence[int]]:
        return {"": [1] * 4}

    def encode(self, value: np.ndarray, context: Context) -> Mapping[str, Sequence[Plane]]:
        return {"": scalars.encode_values(value)}

    def decode(self, planes: Mapping[str, Sequence[Plane]], context: Context) -> np.ndarray:
        return scalars.decode_values(planes[""], self.column)


class LabelLogprob(Coding):
    """Log-probabilities as IEEE halves."""

    def item_bytes(self, manifest: Manifest) -> Mapping[str, Sequence[int]]:
        return {"": [1] * 2}

    def encode(self, value: np.ndarray, context: Context) -> Mapping[str, Sequence[Plane]]:
        return {"": scalars.encode_label_logprob(value)}

    def decode(self, planes: Mapping[str, Sequence[Plane]], context: Context) -> np.ndarray:
        return scalars.decode_label_logprob(planes[""])


class Entropy(Coding):
    """Entropies as a share of the largest there can be, one byte."""

    def item_bytes(self, manifest: Manifest) -> Mapping[str, Sequence[int]]:
        return {"": [1]}

    def encode(self, value: np.ndarray, context: Context) -> Mapping[str, Sequence[Plane]]:
        return {"": [scalars.encode_entropy(value, context.manifest.targets.num_classes)]}

    def decode(self, planes: Mapping[str, Sequence[Plane]], context: Context) -> np.ndarray:
        return scalars.decode_entropy(planes[""][0], context.manifest.targets.num_classes)


class LogPartitionRatios(Coding):
    """One column for each stored temperature; in a block by temperature."""

    def item_bytes(self, manifest: Manifest) -> Mapping[str, Sequence[int]]:
        return {f"{temperature:g}": [1] * 2 for temperature in manifest.targets.temperatures}

    def encode(
        self, value: Mapping[float, np.ndarray], context: Context
    ) -> Mapping[str, Sequence[Plane]]:
        classes = context.manifest.targets.num_classes
        return {
            f"{t:g}": scalars.encode_log_partition_ratio(ratio, t, classes)
            for t, ratio in value.items()
        }

    def decode(
        self, planes: Mapping[str, Sequence[Plane]], context: Context
    ) -> Mapping[float, np.ndarray]:
        classes = context.manifest.targets.num_classes
        return {
            t: scalars.decode_log_partition_ratio(planes[f"{t:g}"], t, classes)
            for t in context.manifest.targets.temperatures
            if f"{t:g}" in planes
        }


class HiddenStates(Coding):
    """One column for each stored layer; in a block by layer."""

    def item_bytes(self, manifest: Manifest) -> Mapping[str, Sequence[int]]:
        spec = manifest.hidden
        layers = zip(spec.layers, spec.widths, strict=True)
        return {str(layer): hidden.plane_bytes(spec.codec, width) for layer, width in layers}

    def encode(
        self, value: Mapping[int, np.ndarray], context: Context
    ) -> Mapping[str, Sequence[Plane]]:
        codec, scales = context.manifest.hidden.codec, context.scales
        return {
            str(layer): hidden.encode(states, codec, scales.get(layer))
            for layer, states in value.items()
        }

    def decode(
        self, planes: Mapping[str, Sequence[Plane]], context: Context
    ) -> Mapping[int, np.ndarray]:
        spec, scales = context.manifest.hidden, context.scales
        return {
            layer: hidden.decode(planes[str(layer)], spec.codec, width, scales.get(layer))
            for layer, width in zip(spec.layers, spec.widths, strict=True)
            if str(layer) in planes
        }


def bytes_for(largest: int) -> int:
    """Bytes that hold the number `largest`: 1 up to 255, 2 up to 65,535, and so on."""
    return max(1, (largest.bit_length() + 7) // 8)
