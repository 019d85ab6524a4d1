"""Question answering in stage two: classes are the tokens of a window, positions start and end."""

from collections.abc import Iterator, Sequence

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from shared.cache import Cache
from shared.format.layouts import NO_ANSWER, PLACES
from shared.format.manifest import Manifest
from shared.rows import Row
from student_train.data.arrange import WINDOWS
from student_train.loss.outputs import OF_WINDOWS
from student_train.tasks.base import Collector, HardLabels, NameOf
from student_train.tasks.heads import HeadedTask
from student_train.tasks.samples import Reading, Sample, sequences_of
from student_train.tasks.span_answers import SpanAnswers


class QuestionTask(HeadedTask):
    """A student points at the first and the last token of an answer, or at token 0: none."""

    arrangement = WINDOWS
    outputs = OF_WINDOWS
    has_token_positions = False

    def shape_head(self, config: PretrainedConfig, cache: Cache, *, is_new: bool) -> None:
        if is_new:
            config.num_labels = len(PLACES)

    def collector(self, cache: Cache, max_answer_tokens: int) -> Collector | None:
        return SpanAnswers(cache, max_answer_tokens)

    def name_of(
        self, manifest: Manifest, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> NameOf:
        """A token by its place and its text."""

        def name(place: int, number: int) -> str:
            return "no answer" if number == NO_ANSWER else f"{number}: {texts[number].strip()}"

        return name

    def tokens_about(
        self, row: Row, place: int, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[int, int] | None:
        """The token where an answer begins or ends: the label of the position."""
        label = int(row.labels[place])
        return None if label == NO_ANSWER else (label, label + 1)

    def samples(self, row: Row, number: int, reading: Reading) -> Iterator[Sample]:
        """Question and context are read together."""
        yield from sequences_of(row, number, (len(row.input_ids),), reading)

    def hard_labels(self, manifest: Manifest, config: PretrainedConfig) -> HardLabels | None:
        return None
