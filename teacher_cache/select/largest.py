"""What calibration learns from: the largest classes of some positions, statistics of channels.

N positions, K classes of each, D channels.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from shared.format.manifest import HiddenSpec
from shared.targets.hidden import ChannelScale, ChannelStatistics, int8_scale, without_massive
from shared.targets.spec import TargetSpec
from teacher_cache.select.base import Selected
from teacher_cache.select.kinds import largest_classes


@dataclass(frozen=True, slots=True)
class Largest:
    """The largest classes of N positions, descending, and what the asked-for layers look like."""

    ids_NK: Tensor
    logprobs_NK: Tensor
    statistics: dict[int, ChannelStatistics]
    ordinary: dict[int, ChannelStatistics]  # without the massive states

    def scales(self, hidden: HiddenSpec) -> dict[int, ChannelScale]:
        """Centre and unit of each channel of each layer, where the codec has them."""
        if hidden.codec != "int8":
            return {}
        return {layer: int8_scale(channel) for layer, channel in self.ordinary.items()}


@dataclass(slots=True)
class LargestSoFar:
    """A `Largest` in the making, forward by forward, without positions of NaN or infinity."""

    targets: TargetSpec
    _classes: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _statistics: dict[int, ChannelStatistics] = field(default_factory=dict)
    _ordinary: dict[int, ChannelStatistics] = field(default_factory=dict)

    @property
    def spec(self) -> TargetSpec:
        """What `add` expects to be selected by."""
        return largest_classes(self.targets)

    def add(self, selected: Selected) -> None:
        good = ~selected.bad_N
        self._classes.append((selected.ids[good].cpu(), selected.logprobs[good].cpu()))

    def add_states(self, hidden: dict[int, Tensor]) -> None:
        """States [N, D] of each layer."""
        for layer, states_ND in hidden.items():
            finite = states_ND[states_ND.isfinite().all(dim=1)]  # --nonfinite drop drops the rest
            bits = finite.to("cpu", torch.bfloat16).view(torch.uint16).numpy()
            for found, some in ((self._statistics, bits), (self._ordinary, without_massive(bits))):
                more = ChannelStatistics.of(some)
                found[layer] = found[layer].merge(more) if layer in found else more

    def largest(self) -> Largest:
        nothing = torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1)
        parts = zip(*(self._classes or [nothing]), strict=True)
        ids_NK, logprobs_NK = (torch.cat(each) for each in parts)
        return Largest(ids_NK, logprobs_NK, self._statistics, self._ordinary)
