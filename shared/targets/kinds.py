"""The table of the kinds of targets: the one place where they have their names.

topk      the `top_k` largest classes
adaptive  every class with p >= `threshold`, the largest always: `mean_entries` on average
sample    every class with p >= `threshold` as it is, the others drawn by systematic sampling with
          that spacing, each drawn one with that weight (Fearnhead and Clifford 2003)
dense     every class
values    no distribution but a number, of a regression: one class, which stands for none
none      hard labels only
"""

from typing import Any

from shared.targets.base import Kind, TargetKind
from shared.targets.dense import Dense
from shared.targets.ragged import Adaptive, Sample
from shared.targets.topk import TopK
from shared.targets.values import NoTargets, Values

KINDS: dict[TargetKind, Kind[Any]] = {
    "topk": TopK(),
    "adaptive": Adaptive(),
    "sample": Sample(),
    "dense": Dense(),
    "values": Values(),
    "none": NoTargets(),
}
