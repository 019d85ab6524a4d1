"""The teacher writes the targets: sequence-level distillation (Kim and Rush 2016, section 3.2).

Documents of a shard go in runs of a fixed number; the sources of a run are put into batches of
similar length, and what is drawn depends on the seed and on the first document of a batch. So what
is written is a function of (manifest, shard), like the rows that are then made of it. The tokens
themselves are kept, not a text that would have to become tokens again.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from shared.format.manifest import GenerationSpec, Preprocessing
from teacher_cache.corpus.documents import Written
from teacher_cache.engines.base import Engine
from teacher_cache.tasks.base import TeacherTask
from teacher_cache.tasks.rows import document_ends

_AT_ONCE = 256  # documents whose sources are sorted by length together


@dataclass(frozen=True, slots=True)
class Writer:
    """An engine, and everything else that decides what it writes for a document."""

    task: TeacherTask
    tokenizer: Any  # PreTrainedTokenizerBase
    preprocessing: Preprocessing
    spec: GenerationSpec
    engine: Engine
    forward_tokens: int

    def written(
        self,
        documents: Iterable[tuple[int, Any]],
        counters: Counter[str],
        check_stop: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[int, Written]]:
        """Each document with what the teacher writes for it, in order."""
        iterator = iter(documents)
        while some := list(islice(iterator, _AT_ONCE)):
            yield from self._run(some, counters, check_stop)

    def _run(
        self,
        documents: Sequence[tuple[int, Any]],
        counters: Counter[str],
        check_stop: Callable[[], None],
    ) -> Iterator[tuple[int, Written]]:
        asked = self.task.sources(documents, self.tokenizer, self.preprocessing, counters)
        written: list[list[int]] = [[] for _ in asked]
        limit, ends = self.forward_tokens // self.spec.num_beams, self.engine.ends()
        for batch in _batches([ids for ids, _ in asked], limit, self.spec.max_new_tokens):
            check_stop()
            first, sources = documents[batch[0]][0], [asked[place][0] for place in batch]
            tokens = self.engine.write(sources, first, self.preprocessing)
            for place, answer in zip(batch, tokens, strict=True):
                written[place] = answer
                counters["generated_documents"] += 1
                counters["generations_without_end"] += answer[-1:] not in [[e] for e in ends]
        for (index, _), (ids, references), answer in zip(documents, asked, written, strict=True):
            yield index, Written(tuple(ids), tuple(answer), references)


def _batches(
    sources: Sequence[list[int]], forward_tokens: int, max_new_tokens: int
) -> Iterator[list[int]]:
    """Places of sources that are not empty, longest first, ties in order."""
    there = [place for place, source in enumerate(sources) if source]
    order = sorted(there, key=lambda place: (-len(sources[place]), place))
    while order:
        count = max(1, forward_tokens // (len(sources[order[0]]) + max_new_tokens))
        yield order[:count]
        order = order[count:]


def stand_ins(
    documents: Iterable[tuple[int, Any]],
    task: TeacherTask,
    tokenizer: Any,
    preprocessing: Preprocessing,
    counters: Counter[str],
) -> Iterator[tuple[int, Written]]:
    """Documents as they may look once written, for a plan that reads no weights.

    Answers are as long as the corpus' own, or half of --max-new-tokens where it has none.
    """
    assert preprocessing.generation is not None
    most, numbered = preprocessing.generation.max_new_tokens, list(documents)
    asked = task.sources(numbered, tokenizer, preprocessing, counters)
    for (index, _), (ids, references) in zip(numbered, asked, strict=True):
        size = most // 2 + 1
        if references:
            size = len(tokenizer(references[0], verbose=False)["input_ids"])
        end = document_ends(tokenizer).eos[0]
        yield index, Written(tuple(ids), (end,) * min(size, most) if ids else (), references)
