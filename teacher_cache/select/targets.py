"""Turns a teacher's logits into targets: the classes to keep, and a few sums over all classes.

N positions, V logit width, C classes (the first C columns).
"""

from torch import Tensor

from shared.targets.spec import TargetSpec
from teacher_cache.select.base import Selected
from teacher_cache.select.kinds import SELECTORS


def select(
    logits_NV: Tensor,
    spec: TargetSpec,
    labels_N: Tensor | None = None,
    offset_N: Tensor | None = None,
) -> Selected:
    """The classes that `spec` keeps of each position.

    Of `topk` exactly the best ones: larger logit first, then smaller id. `sample` needs offset_N,
    float64 in [0, 1), that says where each position's grid begins. Minus infinity is a legal logit
    (a masked class) and becomes an entry only where a topk has fewer finite classes, or all are
    kept. Columns at or beyond C do not exist for any result.
    """
    return SELECTORS[spec.kind].select(logits_NV, spec, labels_N, offset_N)
