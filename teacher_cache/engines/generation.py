"""The teacher writes the targets: sequence-level distillation (Kim and Rush 2016, section 3.2).

Documents of a shard go in runs of a fixed number; the sources of a run are put into batches of
similar length, and what is drawn depends on the seed and on the first document of a batch. So what
is written is a function of (manifest, shard), like the rows that are then made of it. The tokens
themselves are kept, not a text that would have to become tokens again.

B sources of a batch, S tokens of the longest, N new ones.
"""

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import xxhash

from shared.arrays import mixed_bits
from shared.errors import CorpusError, TeacherCacheError
from shared.format.manifest import GenerationSpec, Preprocessing
from shared.models.decoding import caches_all_blocks
from shared.models.tokenizer import end_of_text
from shared.tasks import TaskName
from teacher_cache.corpus.chat import Conversation, Exchange, split_answer, written_prompt
from teacher_cache.engines.batches import padded
from teacher_cache.engines.memory import is_out_of_memory
from teacher_cache.engines.teacher import Teacher, weights_digest
from teacher_cache.tasks.rows import Written, document_ends
from teacher_cache.tasks.seq2seq_rows import PairEncoder, source_before_answer

_AT_ONCE = 256  # documents whose sources are sorted by length together


@dataclass(frozen=True, slots=True)
class Writer:
    """A teacher, and everything else that decides what it writes for a document."""

    task: TaskName
    tokenizer: Any  # PreTrainedTokenizerBase
    preprocessing: Preprocessing
    spec: GenerationSpec
    teacher: Teacher
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
        asked = sources(documents, self.task, self.tokenizer, self.preprocessing, counters)
        written: list[list[int]] = [[] for _ in asked]
        limit = self.forward_tokens // self.spec.num_beams
        for batch in _batches([ids for ids, _ in asked], limit, self.spec.max_new_tokens):
            check_stop()
            first = documents[batch[0]][0]
            tokens = self._write([asked[place][0] for place in batch], first)
            for place, answer in zip(batch, tokens, strict=True):
                written[place] = answer
                counters["generated_documents"] += 1
                counters["generations_without_end"] += answer[-1:] not in [[e] for e in self._ends]
        for (index, _), (ids, references), answer in zip(documents, asked, written, strict=True):
            yield index, Written(tuple(ids), tuple(answer), references)

    @property
    def _ends(self) -> list[int]:
        """Tokens that end a text: the teacher's own, else the tokenizer's."""
        own = self.teacher.model.generation_config.eos_token_id
        if own is None:
            own = end_of_text(self.tokenizer)
        return [own] if isinstance(own, int) else list(own or ())

    def _write(self, sources: Sequence[list[int]], first_document: int) -> list[list[int]]:
        """New tokens of each source, up to the first end, which is among them where it was said."""
        device, of_pairs = self.teacher.device, self.task == "seq2seq-lm"
        arrays = [np.array(source) for source in sources]
        if of_pairs:
            ids_BS, mask_BS = padded(arrays)
        else:  # what is written comes right behind
            ids_BS, mask_BS = (side.flip(1) for side in padded([ids[::-1] for ids in arrays]))
        seed = int(mixed_bits(self.spec.seed, first_document)[0] >> np.uint64(1))
        devices = [device] if device.type == "cuda" else []
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed)
                output_BN = self.teacher.model.generate(
                    input_ids=ids_BS.to(device),
                    attention_mask=mask_BS.to(device),
                    generation_config=self._settings(),
                )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise TeacherCacheError(
                f"out of memory: writing {self.spec.max_new_tokens:,} tokens for {len(sources):,} "
                f"sources of up to {ids_BS.shape[1]:,}, from document {first_document}, does not "
                "fit. Start another cache with a smaller --forward-tokens or --max-new-tokens."
            ) from error
        new_BN = output_BN[:, 1:] if of_pairs else output_BN[:, ids_BS.shape[1] :]
        return [self._up_to_end(tokens) for tokens in new_BN.tolist()]

    def _up_to_end(self, tokens: list[int]) -> list[int]:
        ends = set(self._ends)
        stop = next((place + 1 for place, token in enumerate(tokens) if token in ends), None)
        return tokens[:stop]

    def _settings(self) -> Any:
        """The teacher's own settings (a forced first token, a penalty) with what was asked for."""
        spec, settings = self.spec, copy.deepcopy(self.teacher.model.generation_config)
        pad = self.tokenizer.pad_token_id
        settings.update(
            max_length=None,
            max_new_tokens=spec.max_new_tokens,
            num_beams=spec.num_beams,
            do_sample=spec.temperature > 0,
            temperature=spec.temperature or None,
            top_p=spec.top_p if spec.temperature else None,
            top_k=0 if spec.temperature else None,
            eos_token_id=self._ends,
            pad_token_id=self._ends[0] if pad is None else pad,
            use_cache=caches_all_blocks(self.teacher.model.config),
            # A head may be wider than there are tokens.
            suppress_tokens=[
                *(settings.suppress_tokens or ()),
                *range(self.teacher.num_classes, self.teacher.logit_width),
            ]
            or None,
        )
        if self.task == "seq2seq-lm":
            settings.decoder_start_token_id = self.preprocessing.decoder_start
        return settings


def writer_hash(teacher: Teacher) -> str:
    """Over the weights, and over the settings by which the teacher writes."""
    settings = teacher.model.generation_config.to_diff_dict()
    settings.pop("transformers_version", None)
    parts = [weights_digest(teacher.model), settings]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())


def sources(
    documents: Sequence[tuple[int, Any]],
    task: TaskName,
    tokenizer: Any,
    preprocessing: Preprocessing,
    counters: Counter[str],
) -> list[tuple[list[int], tuple[str, ...]]]:
    """What the teacher reads of each document, and what the corpus has as answers to it."""
    if task != "seq2seq-lm":
        return [_prompt(each, tokenizer, preprocessing, counters) for each in documents]
    encoder, found = PairEncoder(tokenizer, preprocessing), []
    for index, document in documents:
        source, targets = source_before_answer(document, tokenizer, f"document {index}")
        found.append((encoder.source(source, counters), targets))
    return found


def _prompt(
    numbered: tuple[int, Any], tokenizer: Any, preprocessing: Preprocessing, counters: Counter[str]
) -> tuple[list[int], tuple[str, ...]]:
    """Of a conversation or an exchange; cut in front, so that prompt and answer are one row."""
    index, document = numbered
    where = f"document {index}"
    answer: tuple[str, ...]
    bos: tuple[int, ...] = ()
    if isinstance(document, Exchange):
        answer = (document.completion,) if document.completion else ()
        before = Conversation(({"role": "user", "content": document.prompt},))
        empty = not document.prompt.strip()
    else:
        before, answer = split_answer(document)
        empty = not before.messages
    if empty:
        return [], answer
    if tokenizer.chat_template is not None:
        text = written_prompt(before, tokenizer, where)
    elif isinstance(document, Exchange):
        prompt, bos = document.prompt, document_ends(tokenizer).bos
        text = prompt if prompt[-1:].isspace() else prompt + "\n"
    else:
        raise CorpusError(
            f"{tokenizer.name_or_path}: this tokenizer has no chat template, which a column of "
            "messages needs. Name another --tokenizer, or put a chat_template.jinja beside it."
        )
    ids = [*bos, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    assert preprocessing.generation is not None  # nothing is written without
    room = preprocessing.max_length - preprocessing.generation.max_new_tokens
    counters["cut_sources"] += len(ids) > room
    return ids[-room:], answer


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
    task: TaskName,
    tokenizer: Any,
    preprocessing: Preprocessing,
    counters: Counter[str],
) -> Iterator[tuple[int, Written]]:
    """Documents as they may look once written, for a plan that reads no weights.

    Answers are as long as the corpus' own, or half of --max-new-tokens where it has none.
    """
    assert preprocessing.generation is not None
    most, numbered = preprocessing.generation.max_new_tokens, list(documents)
    asked = sources(numbered, task, tokenizer, preprocessing, counters)
    for (index, _), (ids, references) in zip(numbered, asked, strict=True):
        size = most // 2 + 1
        if references:
            size = len(tokenizer(references[0], verbose=False)["input_ids"])
        end = document_ends(tokenizer).eos[0]
        yield index, Written(tuple(ids), (end,) * min(size, most) if ids else (), references)
