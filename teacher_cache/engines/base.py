"""What a capture job asks of an engine, which runs a teacher over rows.

`hf.py` is the reference: a model of `transformers` in this process. `table.py` lists all, and
`tests/teacher_cache/engines/test_conformance.py` holds each of them to this page.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from shared.format.manifest import HiddenSpec, Manifest, Preprocessing, TeacherInfo
from shared.targets.spec import TargetSpec
from teacher_cache.config import CaptureConfig
from teacher_cache.select.largest import Largest
from teacher_cache.select.window import WindowTargets
from teacher_cache.tasks.base import TeacherTask
from teacher_cache.tasks.rows import TrainingRow


class Engine(Protocol):
    """A teacher that is ready to run. Every method takes rows of the task it was loaded for."""

    def info(self) -> TeacherInfo:
        """Which teacher this is, and how it runs; part of the manifest."""

    @property
    def num_classes(self) -> int:
        """Classes of its distributions, where they are neither labels nor tokens of a row."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of its classes; none where these are no labels."""

    @property
    def hidden_width(self) -> int:
        """Channels of a hidden state."""

    @property
    def default_forward_tokens(self) -> int:
        """Tokens of one forward before calibration has tried it."""

    @property
    def chunk_positions(self) -> int:
        """Positions whose logits exist at once; part of the plan, for it changes the rounding."""

    def fits(
        self,
        rows: Sequence[TrainingRow],
        targets: TargetSpec,
        hidden: HiddenSpec,
        *,
        forward_tokens: int,
        packed: bool,
    ) -> bool:
        """Whether forwards of so many tokens fit into the device's memory; tried on these rows."""

    def largest(
        self,
        rows: Sequence[TrainingRow],
        targets: TargetSpec,
        hidden: HiddenSpec,
        *,
        forward_tokens: int,
        packed: bool,
    ) -> Largest:
        """The largest classes at every position of these rows, and statistics of the channels."""

    def capture(
        self, rows: Sequence[TrainingRow], manifest: Manifest, check_stop: Callable[[], None]
    ) -> WindowTargets:
        """The targets and hidden states of all positions of these rows, in their order.

        NaN and infinity are marked, not left out. What no longer fits into memory is run in halves;
        the plan stays as it is. `check_stop` is called before each forward and may raise.
        """

    def writer_hash(self) -> str:
        """What else than --generate's options decides what `write` writes."""

    def ends(self) -> list[int]:
        """Tokens that end what `write` writes."""

    def write(
        self, sources: Sequence[list[int]], first_document: int, options: Preprocessing
    ) -> list[list[int]]:
        """New tokens behind each source, up to the first end, which is among them if it was said.

        `options.generation` says how; what is drawn depends on its seed and `first_document`.
        """


# Loads the teacher that a config names, and refuses what it cannot do of what the config asks.
LoadEngine = Callable[[CaptureConfig, TeacherTask], Engine]
