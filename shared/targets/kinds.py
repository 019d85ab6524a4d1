"""What can be said of each kind of targets without naming it."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """The traits of a kind.

    has_targets        something of a teacher is kept; without it there are hard labels only
    numbers            what is kept of a position is one number, and no distribution over classes
    ragged             positions differ in their number of entries; their counts are stored
    sampled            entries are weights of an unbiased sample, and there is no tail
    truncated          the likeliest classes are entries, and all others are one tail
    every_temperature  nothing is cut off, so that the distribution is exact at any temperature
    reads              the options that decide how much is kept and how finely
    """

    has_targets: bool = True
    numbers: bool = False
    ragged: bool = False
    sampled: bool = False
    truncated: bool = False
    every_temperature: bool = False
    reads: frozenset[str] = frozenset()

    @property
    def distributions(self) -> bool:
        """Whether what is kept of a position is a distribution over the classes."""
        return self.has_targets and not self.numbers


_MEAN = frozenset({"mean_entries", "value_bits"})
KINDS: Mapping[str, Kind] = {
    "topk": Kind(truncated=True, reads=frozenset({"top_k", "value_bits"})),
    "adaptive": Kind(ragged=True, truncated=True, reads=_MEAN),
    "sample": Kind(ragged=True, sampled=True, reads=_MEAN),
    "dense": Kind(every_temperature=True),
    "values": Kind(numbers=True),
    "none": Kind(has_targets=False),
}
