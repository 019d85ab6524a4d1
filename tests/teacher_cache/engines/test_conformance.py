"""What every engine must do (`teacher_cache/engines/base.py`), whatever runs behind it.

The reference engine does it for a task of each way to read rows and to predict; an engine without
any model does it too, and a whole cache is made with that.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertForMaskedLM, BertModel

from shared.cache import open_cache
from shared.errors import Stopped, TeacherCacheError
from shared.format.blocks import Block
from shared.format.manifest import GenerationSpec, Manifest
from shared.storage.local import LocalStorage
from teacher_cache.config import CaptureConfig
from teacher_cache.engines.base import Engine, LoadEngine
from teacher_cache.engines.batches import forward_batches
from teacher_cache.engines.hf import TransformersEngine, teacher_of
from teacher_cache.engines.table import ENGINES
from teacher_cache.engines.teacher import Teacher
from teacher_cache.job.assemble import assemble
from teacher_cache.job.calibrate import publish_or_adopt
from teacher_cache.job.draft import Draft, resolve
from teacher_cache.job.run import run
from teacher_cache.tasks.rows import TrainingRow
from tests import output_caches, questions, seq2seq
from tests.teacher_cache.engines.toy import ToyEngine
from tests.teacher_cache.tasks.test_masked import bert_config, tokenizer_of

CASES = ("text", "masked", "pairs", "several", "spans", "vectors", "toy")
WITH_STATES = ("text", "masked", "pairs", "vectors", "toy")
WRITING = ("text", "pairs", "toy")
DOCUMENTS = 24


@dataclass
class Case:
    """A job whose plan is published, and rows of it."""

    name: str
    draft: Draft
    manifest: Manifest
    rows: list[TrainingRow]

    @property
    def engine(self) -> Engine:
        assert self.draft.engine is not None
        return self.draft.engine

    def capture(self, rows: list[TrainingRow], check_stop: Callable[[], None] = lambda: None):
        return self.engine.capture(rows, self.manifest, check_stop)

    def block(self, rows: list[TrainingRow]) -> Block:
        window = self.capture(rows)
        assert window.bad_rows() == {}
        return assemble(rows, range(len(rows)), window, self.manifest.columns)


@pytest.fixture(scope="module")
def options(corpus_file, teacher_dir, tokenizer_dir, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """A teacher, a corpus and the other options of each case."""
    folder = tmp_path_factory.mktemp("engines")
    tokenizer = tokenizer_of(corpus_file.read_text())
    torch.manual_seed(0)
    for name, kind in (("masked", BertForMaskedLM), ("vectors", BertModel)):
        kind(bert_config(len(tokenizer))).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    seq2seq.make_tokenizer(folder / "t5")
    seq2seq.make_model("t5").save_pretrained(folder / "t5")
    seq2seq.make_corpus(folder / "pairs.jsonl", DOCUMENTS)
    output_caches.save_teacher(
        folder / "several", output_caches.TOPICS, problem_type="multi_label_classification"
    )
    output_caches.write_corpus(folder / "several.jsonl", "multi_label")
    questions.make_teacher().save_pretrained(folder / "spans")
    questions.make_tokenizer().save_pretrained(folder / "spans")
    questions.write_corpus(folder / "questions.jsonl", questions.make_documents(DOCUMENTS))
    text = {"corpus": str(corpus_file), "limit_documents": DOCUMENTS, "max_length": 32}
    states = {"hidden_layers": (-1,)}
    dense = {"targets": "dense"}
    return {
        "text": text | states | dense | {"teacher": str(teacher_dir)},
        "masked": text | states | dense | {"teacher": str(folder / "masked"), "task": "masked-lm"},
        "pairs": states
        | dense
        | {
            "teacher": str(folder / "t5"),
            "corpus": str(folder / "pairs.jsonl"),
            "task": "seq2seq-lm",
            "max_length": seq2seq.MAX_LENGTH,
            "max_target_length": seq2seq.MAX_TARGET_LENGTH,
        },
        "several": {
            "teacher": str(folder / "several"),
            "corpus": str(folder / "several.jsonl"),
            "task": "sequence-classification",
        },
        "spans": {
            "teacher": str(folder / "spans"),
            "corpus": str(folder / "questions.jsonl"),
            "task": "question-answering",
            "max_length": questions.MAX_LENGTH,
            "stride": questions.STRIDE,
        },
        "vectors": text
        | states
        | {
            "teacher": str(folder / "vectors"),
            "task": "feature-extraction",
            "pooling": "none",
        },
        "toy": text | states | dense | {"teacher": "toy", "tokenizer": str(tokenizer_dir)},
    }


def engine_of(name: str) -> LoadEngine:
    return ToyEngine.load if name == "toy" else TransformersEngine.load


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, options, tmp_path: Path) -> Case:
    return make_case(request.param, options, tmp_path)


def make_case(name: str, options: dict[str, dict[str, Any]], folder: Path) -> Case:
    config = CaptureConfig(out=folder / "cache", device="cpu", forward_tokens=128, **options[name])
    draft = resolve(config, load_engine=engine_of(name))
    manifest, _ = publish_or_adopt(draft, LocalStorage(config.out))
    indices = range(len(draft.corpus))
    documents = zip(indices, draft.corpus.read(indices), strict=True)
    rows = list(draft.build_rows(documents, Counter()))
    assert len({len(row.input_ids) for row in rows}) > 3
    return Case(name, draft, manifest, rows)


def limit(case: Case, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no forward of a capture has room for more than so many tokens."""
    if isinstance(case.engine, ToyEngine):
        case.engine.room = tokens
        return
    forward = Teacher.forward

    def limited(self: Teacher, batch: Any, *args: Any, **more: Any) -> Any:
        if batch.input_ids.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, batch, *args, **more)

    monkeypatch.setattr(Teacher, "forward", limited)


def largest_forward(case: Case) -> int:
    """Tokens that the largest forward of the plan reads, padding included."""
    inputs = case.draft.task.inputs
    tokens = case.manifest.plan.forward_tokens
    batches = forward_batches(case.rows, tokens, packed=False, inputs=inputs)
    return max(batch.inputs.input_ids.numel() for batch in batches)


def poison(case: Case, token: int) -> None:
    """From now on the teacher gives NaN once it has read this token."""
    if isinstance(case.engine, ToyEngine):
        case.engine.poisoned.add(token)
        return

    def hook(_: Any, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((arguments[0] == token)[..., None], torch.nan)

    model = teacher_of(case.engine).model
    words = model.get_input_embeddings().weight
    for module in model.modules():  # encoder and decoder may have a module each for one table
        if isinstance(module, torch.nn.Embedding) and module.weight is words:
            module.register_forward_hook(hook)


def same_blocks(one: Block, other: Block) -> None:
    assert np.array_equal(one.row_ids, other.row_ids)
    assert np.array_equal(one.positions, other.positions)
    close = {"rtol": 0, "atol": 2e-4}  # nats; batches of other shapes round otherwise in float32
    if one.target is not None and other.target is not None:
        assert np.array_equal(one.target.ids, other.target.ids)
        np.testing.assert_allclose(one.target.logprobs, other.target.logprobs, **close)
        np.testing.assert_allclose(one.entropy, other.entropy, **close)
    for layer, states in one.hidden.items():
        ours, theirs = (float32(each) for each in (states, other.hidden[layer]))
        np.testing.assert_allclose(ours, theirs, rtol=2**-6, atol=1e-3)  # two steps of bfloat16


def float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_every_engine_of_the_table_is_tried_here():
    assert [*ENGINES.values()] == [TransformersEngine.load]


def test_a_window_has_the_shapes_of_its_rows(case):
    block, positions = case.block(case.rows), sum(row.num_positions for row in case.rows)
    assert block.num_positions.tolist() == [row.num_positions for row in case.rows]
    if case.name == "vectors":
        assert block.target is None
    else:
        classes = case.manifest.targets.num_classes
        assert block.target.logprobs.shape == (positions, classes)
        mass_P = np.exp(block.target.logprobs.astype(np.float64)).sum(axis=1)
        np.testing.assert_allclose(mass_P, 1, atol=1e-5)  # float32
        assert block.entropy.shape == (positions,)
    assert [*block.hidden] == list(case.manifest.hidden.layers)
    for states in block.hidden.values():
        assert states.shape == (positions, case.engine.hidden_width)


def test_the_order_is_that_of_the_rows(case):
    """Each row alone gives what it gives among the others, in whatever order these run."""
    window = case.capture(case.rows)
    for index in (0, 1, len(case.rows) // 2, len(case.rows) - 1):
        among = assemble(case.rows, [index], window, case.manifest.columns)
        same_blocks(among, case.block([case.rows[index]]))


def test_states_are_there_where_they_are_asked_for(case):
    assert bool(case.manifest.hidden.layers) == (case.name in WITH_STATES)
    bare = replace(
        case.manifest, hidden=replace(case.manifest.hidden, layers=(), widths=(), pooling="none")
    )
    window = case.engine.capture(case.rows, bare, lambda: None)
    assert assemble(case.rows, [0], window, bare.columns).hidden == {}


def test_what_does_not_fit_is_run_in_halves(case, monkeypatch):
    whole = case.block(case.rows)
    limit(case, largest_forward(case) - 1, monkeypatch)
    window = case.capture(case.rows)
    assert window.forwards_halved > 0
    same_blocks(assemble(case.rows, range(len(case.rows)), window, case.manifest.columns), whole)


def test_a_row_that_does_not_fit_alone_is_named(case, monkeypatch):
    limit(case, 1, monkeypatch)
    with pytest.raises(TeacherCacheError, match="out of memory: the row of document"):
        case.capture(case.rows)


def test_nan_is_flagged_in_the_rows_that_have_it(case):
    counts = np.bincount(np.concatenate([np.unique(row.input_ids) for row in case.rows]))
    counts[:5] = 0  # padding, which every row may have, and special tokens
    token = int(np.argmax((counts > 0) & (counts < len(case.rows) // 2)))
    poison(case, token)
    bad = case.capture(case.rows).bad_rows()
    read = [row.input_ids for row in case.rows]
    if case.name in ("text", "pairs", "toy"):
        read = [ids[:-1] for ids in read]  # nothing is predicted behind the last token
    assert [*bad] == [index for index, ids in enumerate(read) if token in ids]
    assert 0 < len(bad) < len(case.rows)


def test_a_capture_can_be_stopped_between_two_forwards(case):
    calls = 0

    def check_stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Stopped("enough")

    with pytest.raises(Stopped):
        case.capture(case.rows, check_stop)


def test_calibration_sees_the_largest_classes_of_every_position(case):
    packed = case.manifest.preprocessing.pack
    found = case.engine.largest(
        case.rows, case.manifest.targets, case.manifest.hidden, forward_tokens=128, packed=packed
    )
    if case.name != "vectors":
        positions = sum(row.num_positions for row in case.rows)
        most = min(255, case.manifest.targets.num_classes)
        assert found.ids_NK.shape == found.logprobs_NK.shape == (positions, most)
        descending = found.logprobs_NK[:, 1:] <= found.logprobs_NK[:, :-1]
        assert bool(descending.all())
    assert found.statistics.keys() == set(case.manifest.hidden.layers)


def test_calibration_is_told_what_does_not_fit(case, monkeypatch):
    longest = max(case.rows, key=lambda row: len(row.input_ids))
    given = ([longest] * 2, case.manifest.targets, case.manifest.hidden)
    tokens = 2 * len(longest.input_ids)
    assert case.engine.fits(*given, forward_tokens=tokens, packed=False)
    limit(case, len(longest.input_ids) // 3, monkeypatch)
    assert not case.engine.fits(*given, forward_tokens=tokens, packed=False)


def test_it_says_who_it_is_and_always_the_same(case):
    assert case.engine.info() == case.engine.info() == case.manifest.teacher
    assert case.engine.default_forward_tokens > 0
    assert case.engine.chunk_positions == case.manifest.plan.chunk_positions > 0


@pytest.mark.parametrize("name", WRITING)
def test_it_writes_up_to_an_end_and_the_same_again(name, options, tmp_path):
    case = make_case(name, options, tmp_path)
    spec = GenerationSpec(
        num_beams=1, max_new_tokens=6, temperature=1.0, top_p=1.0, seed=3, writer=""
    )
    asked = replace(case.manifest.preprocessing, generation=spec)
    sources = [[7, 8, 9], [10]]
    written = case.engine.write(sources, 4, asked)
    assert len(written) == 2
    ends = case.engine.ends()
    for tokens in written:
        assert 0 < len(tokens) <= 6
        assert not set(tokens[:-1]) & set(ends)
    assert case.engine.write(sources, 4, asked) == written
    assert case.engine.writer_hash() == case.engine.writer_hash() != ""


@pytest.mark.parametrize("kind", ["dense", "topk", "sample"])
def test_a_cache_is_made_with_an_engine_of_one_s_own(kind, options, tmp_path):
    """Each position holds the distribution of the token before it, as the toy's table has it."""
    config = CaptureConfig(
        out=tmp_path / "cache", device="cpu", **options["toy"] | {"targets": kind}
    )
    run(config, load_engine=ToyEngine.load)
    cache, toy = open_cache(config.out), ToyEngine.load(config, None)
    assert cache.manifest.teacher == toy.info()
    assert len(cache) > 0
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    first = Path(config.corpus).read_text().splitlines()[0]
    read = cache[0].input_ids.tolist()
    assert read == [*tokenizer(first)["input_ids"], tokenizer.eos_token_id][: len(read)]
    logp_VC = toy.logits_VC.log_softmax(dim=1)
    for row in list(cache)[:5]:
        for place in range(len(row.positions)):
            ids, logprobs = row.targets.entries(place)
            expected = logp_VC[row.input_ids[row.positions[place]]]
            if kind == "dense":
                torch.testing.assert_close(logprobs, expected[ids], rtol=0, atol=2**-6)  # fp16
            else:
                assert int(expected.argmax()) in ids.tolist()
