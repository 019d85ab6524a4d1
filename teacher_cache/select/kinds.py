"""Every kind of targets as stage one makes it: one line each. Which one a job gets is said here."""

from typing import TYPE_CHECKING

from shared.errors import ConfigError
from shared.targets.base import TargetKind
from shared.targets.ragged import MAX_ENTRIES
from shared.targets.spec import TargetSpec
from teacher_cache.select.base import Selector
from teacher_cache.select.equal import Dense, TopK
from teacher_cache.select.ragged import Adaptive, Sample
from teacher_cache.select.values import Nothing, Values

if TYPE_CHECKING:
    from teacher_cache.config import CaptureConfig
    from teacher_cache.tasks.base import TeacherTask

SELECTORS: dict[TargetKind, Selector] = {
    "topk": TopK(),
    "adaptive": Adaptive(),
    "sample": Sample(),
    "dense": Dense(),
    "values": Values(),
    "none": Nothing(),
}

DEFAULT_TOP_K = 32
AUTO_DENSE_CLASSES = 256  # 512 bytes a position, and every loss at every temperature is exact


def asked_targets(config: "CaptureConfig", task: "TeacherTask", num_classes: int) -> TargetSpec:
    """What a job keeps of each target, before calibration has found a threshold."""
    if task.numbers:
        return _numbers(config)
    kind = _kind(config, task, num_classes)
    top_k = DEFAULT_TOP_K if config.top_k is None else config.top_k
    return SELECTORS[kind].spec(kind, num_classes, top_k, config)


def _numbers(config: "CaptureConfig") -> TargetSpec:
    if config.asks_for_every_class or config.temperature:
        raise ConfigError(
            "--targets dense and --temperature are of probabilities, but labels are numbers "
            "here (--problem-type regression). Leave them out"
        )
    kind: TargetKind = "none" if config.label_only else "values"
    return TargetSpec(kind=kind, num_classes=1, top_k=1, value_bits=16)


def _kind(config: "CaptureConfig", task: "TeacherTask", num_classes: int) -> TargetKind:
    if not task.predicts:
        return "none"
    if config.asked_kind is not None:
        return config.targets
    if task.keeps_every_class or num_classes <= AUTO_DENSE_CLASSES:
        return "dense"
    asked_for_topk = config.top_k is not None or any(t != 1 for t in config.temperature)
    return "topk" if asked_for_topk else "sample"


def largest_classes(spec: TargetSpec) -> TargetSpec:
    """As many of the largest classes as any position of this kind keeps; numbers as they are."""
    selector = SELECTORS[spec.kind]
    if not selector.learns_classes:
        return spec
    return most_classes(spec.num_classes, selector.most_entries_of(spec))


def most_classes(
    num_classes: int, most: int = MAX_ENTRIES, temperatures: tuple[float, ...] = ()
) -> TargetSpec:
    """The largest classes of each position: so many, or all if there are fewer."""
    most = min(num_classes, most)
    return TargetSpec(kind="topk", num_classes=num_classes, top_k=most, temperatures=temperatures)


def no_targets(num_classes: int) -> TargetSpec:
    """Nothing of a teacher."""
    return TargetSpec(kind="none", num_classes=num_classes)
