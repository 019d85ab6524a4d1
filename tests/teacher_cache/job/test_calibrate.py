"""What start-up learns and refuses."""

import json
import shutil
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from shared import open_cache
from shared.errors import CacheMismatch, ConfigError, CorpusError, Refused
from shared.storage.local import LocalStorage
from teacher_cache.config import CaptureConfig, RepackConfig
from teacher_cache.engines.teacher import Teacher
from teacher_cache.job import calibrate as plan
from teacher_cache.job.draft import Draft, resolve
from teacher_cache.job.run import run
from teacher_cache.tasks.causal import build
from teacher_cache.tasks.inputs import TeacherBatch
from teacher_cache.tools.repack import repack
from tests.conftest import Capture, llama_config

SMALL = {"limit_documents": 30, "shard_tokens": 600, "max_length": 64, "top_k": 8, "device": "cpu"}


@pytest.fixture
def options(teacher_dir: Path, corpus_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Options of a job of 30 documents."""
    paths = {"teacher": str(teacher_dir), "corpus": str(corpus_file), "out": tmp_path / "cache"}
    return SMALL | paths


@pytest.fixture(scope="module")
def small_dir(capture: Capture) -> Path:
    return capture(**SMALL)


@pytest.fixture
def small_copy(small_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_dir, tmp_path / "cache"))


def content(folder: Path) -> dict[str, bytes]:
    """Every file but those of `runs/`, which are each process's own."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "runs"
    }


def refusal(options: dict[str, Any], kind: type[Refused] = Refused) -> str:
    with pytest.raises(kind) as caught:
        run(CaptureConfig(**options))
    return str(caught.value)


def of_words(lengths: list[int], path: Path) -> Path:
    path.write_text("".join("the " * length + "\n" for length in lengths))
    return path


# Refused before any work


def test_no_usable_document_says_what_was_looked_at(options, tmp_path):
    (tmp_path / "c.txt").write_text("\n\n\n")
    message = refusal(options | {"corpus": str(tmp_path / "c.txt")}, CorpusError)
    assert message.startswith(f"{tmp_path / 'c.txt'}: no usable document among the 3 looked at")
    assert "documents: 3, empty documents: 3" in message


def test_top_k_above_the_classes_names_the_largest_that_works(options, tmp_path, tokenizer_dir):
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(vocab_size=50)).save_pretrained(tmp_path / "narrow")
    narrow = {"teacher": str(tmp_path / "narrow"), "tokenizer": str(tokenizer_dir)}
    asked = {"targets": "topk", "top_k": 51}
    message = refusal(options | narrow | asked, ConfigError)
    assert message == "--top-k 51 exceeds the teacher's 50 classes; use --top-k 50 to keep them all"
    assert not options["out"].exists()


def test_a_missing_teacher_shows_both_ways(options):
    with pytest.raises(ConfigError, match=r"--teacher is missing.*--targets none --tokenizer DIR"):
        CaptureConfig(**options | {"teacher": None})


def test_label_only_needs_a_tokenizer_and_nothing_of_a_teacher(options):
    label_only = options | {"targets": "none", "teacher": None, "top_k": None}
    with pytest.raises(ConfigError, match="--targets none needs --tokenizer"):
        CaptureConfig(**label_only)
    for extra in ({"temperature": (2.0,)}, {"hidden_layers": (-1,)}):
        with pytest.raises(ConfigError, match="need a teacher: not with --targets none"):
            CaptureConfig(**label_only | extra | {"tokenizer": "x"})


@pytest.mark.parametrize("teacher", ["none/of/this", "./none", "/none"])
def test_a_teacher_folder_that_is_not_there(options, teacher):
    assert refusal(options | {"teacher": teacher}).startswith(f"{teacher}: no such folder")
    assert not options["out"].exists()


def test_a_hidden_layer_that_does_not_exist(options):
    assert "expected -1 (after the last norm) or a block" in refusal(
        options | {"hidden_layers": (2,)}, ConfigError
    )


# A folder with another cache


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"top_k": 4}, "targets.top_k: the cache has 8, asked for 4"),
        ({"value_bits": 8}, "targets.value_bits: the cache has 7, asked for 8"),
        ({"temperature": (2.0,)}, "targets.temperatures: the cache has (), asked for (2.0,)"),
        ({"hidden_layers": (-1,)}, "hidden.layers: the cache has (), asked for (-1,)"),
        (
            {"hidden_layers": (-1,), "hidden_every": 3},
            "hidden.every: the cache has 1, asked for 3",
        ),
        ({"dtype": "bfloat16"}, "teacher.dtype: the cache has 'float32', asked for 'bfloat16'"),
        ({"max_length": 32}, "preprocessing.max_length: the cache has 64, asked for 32"),
        ({"pack": True}, "preprocessing.pack: the cache has False, asked for True"),
        ({"limit_documents": 29}, "preprocessing.limit_documents: the cache has 30, asked for 29"),
        ({"split": "train[:90%]"}, "preprocessing.split: the cache has 'train', asked for"),
        ({"seed": 1}, "seed: the cache has 0, asked for 1"),
        ({"nonfinite": "drop"}, "nonfinite: the cache has 'stop', asked for 'drop'"),
        ({"shard_tokens": 601}, "shard_tokens: the cache has 600, asked for 601"),
        ({"forward_tokens": 128}, "forward_tokens: the cache has 'auto', asked for 128"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_option_is_refused_by_name(options, small_copy, change, line):
    before = content(small_copy)
    message = refusal(options | {"out": small_copy} | change, CacheMismatch)
    assert message.startswith(f"{small_copy}: this folder holds another cache. ")
    assert line in message
    assert "Choose another --out" in message
    assert content(small_copy) == before


def test_several_differences_are_all_listed(options, small_copy):
    message = refusal(options | {"out": small_copy, "top_k": 4, "seed": 3}, CacheMismatch)
    assert "seed: the cache has 0, asked for 3" in message
    assert "targets.top_k: the cache has 8, asked for 4" in message
    assert "teacher." not in message


def test_the_same_name_with_other_weights_is_refused(options, small_copy, tmp_path):
    teacher = Path(shutil.copytree(options["teacher"], tmp_path / Path(options["teacher"]).name))
    model = LlamaForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(teacher)
    message = refusal(options | {"out": small_copy, "teacher": str(teacher)}, CacheMismatch)
    assert "teacher.weights_digest: the cache has " in message
    assert message.count("the cache has") == 1


def test_one_changed_document_is_refused(options, small_copy, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(Path(options["corpus"]).read_text().replace("the", "thy", 1))
    message = refusal(options | {"out": small_copy, "corpus": str(corpus)}, CacheMismatch)
    assert "corpus.fingerprint: the cache has " in message


def test_a_repacked_cache_is_not_gone_on_with(options, small_dir, tmp_path):
    """All of its shards are there, but of fewer documents: a capture would call it finished."""
    repack(RepackConfig(cache=small_dir, out=tmp_path / "fewer", documents=":20"))
    before = content(tmp_path / "fewer")
    message = refusal(options | {"out": tmp_path / "fewer"}, CacheMismatch)
    assert "this folder holds another cache. origin: the cache has {" in message
    assert "}, asked for None. Choose another --out" in message
    assert content(tmp_path / "fewer") == before


def test_the_same_job_again_changes_nothing(options, small_copy):
    before = content(small_copy)
    run(CaptureConfig(**options | {"out": small_copy, "worker": "1/2"}))
    assert content(small_copy) == before


# What is learnt


@pytest.fixture
def draft_of(options: dict[str, Any], tmp_path: Path) -> Callable[..., Draft]:
    """A draft without a teacher's weights, over documents of so many tokens."""

    def make(lengths: list[int], **more: Any) -> Draft:
        corpus = of_words(lengths, tmp_path / "words.txt")
        chosen = options | {"corpus": str(corpus), "limit_documents": 0} | more
        return resolve(CaptureConfig(**chosen), load_teacher=False)

    return make


def test_a_small_corpus_is_sampled_whole(draft_of):
    draft = draft_of([3, 0, 9, 200, 4], max_length=64)
    sample = plan.sample_corpus(draft)
    counters: Counter[str] = Counter()
    texts = enumerate(draft.corpus.read(range(5)))
    rows = list(build(texts, draft.tokenizer, draft.preprocessing, counters))
    assert sample.documents == 5
    assert sorted(row.row_id for row in sample.rows) == sorted(row.row_id for row in rows)
    assert sample.tokens == sum(len(row.input_ids) for row in rows)
    assert sample.positions == sum(row.num_positions for row in rows)
    assert sample.counters == counters
    ids = np.concatenate([row.input_ids for row in rows])
    assert np.array_equal(np.flatnonzero(sample.token_counts), np.unique(ids))
    assert sample.token_counts.sum() == len(ids)


def test_a_large_corpus_is_sampled_from_end_to_end(draft_of):
    draft = draft_of([2] * 3000)
    sample = plan.sample_corpus(draft)
    documents = sorted(row.row_id >> 24 for row in sample.rows)
    assert sample.documents == len(documents) == 512
    assert (documents[0], documents[-1]) == (0, 2999)
    assert max(np.diff(documents)) <= 2 * 3000 / 512
    assert np.array_equal(sample.token_counts, plan.sample_corpus(draft).token_counts)


@pytest.mark.parametrize(
    ("documents", "shard_tokens", "tokens_wanted"),
    [
        (100, 500, 500),  # as asked
        (100, 2_000_000, 1 << 15),  # never below 32,768 tokens on our own account
        (12_000, 2_000_000, 1 << 15),  # 9,562 tokens would be a 64th
        (12_000, 20_000, 20_000),
    ],
)
def test_documents_of_a_shard(draft_of, documents, shard_tokens, tokens_wanted):
    draft = draft_of([50] * documents, shard_tokens=shard_tokens)
    sample = plan.sample_corpus(draft)
    assert sample.tokens_per_document == len(draft.tokenizer("the " * 50)["input_ids"]) + 1
    found = plan.documents_per_shard(draft, sample)
    assert found == max(1, round(tokens_wanted / sample.tokens_per_document))


def test_a_large_corpus_is_cut_into_64_shards_or_more(draft_of):
    draft = draft_of([2] * 10, shard_tokens=2_000_000)
    sample = replace(plan.sample_corpus(draft), documents=10, tokens=10 * 1_000_000)
    wanted = 10_000_000 / 64 / 1_000_000  # less than one document
    assert plan.documents_per_shard(draft, sample) == max(1, round(wanted))


def test_one_document_is_never_cut_over_shards(draft_of):
    draft = draft_of([400, 400], shard_tokens=1)
    assert plan.documents_per_shard(draft, plan.sample_corpus(draft)) == 1


def test_a_forward_is_halved_until_it_fits_and_the_plan_says_so(options, monkeypatch):
    """The device here has room for 1,000 tokens."""
    forward = Teacher.forward

    def limited(self: Teacher, batch: TeacherBatch, *args: Any, **more: Any) -> Any:
        if batch.input_ids.numel() > 1000:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, batch, *args, **more)

    monkeypatch.setattr(Teacher, "forward", limited)
    run(CaptureConfig(**options))
    cache = open_cache(options["out"])
    assert cache.manifest.plan.forward_tokens == 512  # 4096 halved: 2048, 1024 -> 16 x 64 > 1000
    before = content(options["out"])
    run(CaptureConfig(**options))
    assert content(options["out"]) == before


@pytest.mark.parametrize(
    ("forward_tokens", "sizes", "message"),
    [
        (
            "auto",  # down to one row
            [64, 32, 16, 8, 4, 2, 1],
            r"one row of 64 tokens \(document \d+\) does not fit.*smaller --max-length or --dtype",
        ),
        (
            2000,
            [31],
            r"31 rows of 64 tokens do not fit .* together. Use a smaller --forward-tokens",
        ),
        (64, [1], r"--forward-tokens 64: one row of 64 tokens .*--max-length or --dtype"),
    ],
)
def test_what_never_fits_is_refused_with_the_length(
    options, monkeypatch, forward_tokens, sizes, message
):
    tried = []

    def out_of_memory(_: Teacher, batch: TeacherBatch, *__: Any, **___: Any) -> None:
        tried.append(len(batch.input_ids))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    draft = resolve(CaptureConfig(**options | {"forward_tokens": forward_tokens}))
    monkeypatch.setattr(Teacher, "forward", out_of_memory)
    with pytest.raises(Refused, match=message):
        plan.publish_or_adopt(draft, LocalStorage(options["out"]))
    assert tried == sizes
    assert not list(options["out"].glob("*"))


def test_the_learnt_order_has_the_frequent_classes_first(small_dir):
    cache = open_cache(small_dir)
    counts = np.zeros(cache.manifest.targets.num_classes, np.int64)
    for number in range(cache.num_blocks):
        block = cache.read_block(number)
        ids = np.concatenate([block.input_ids, block.target.ids.reshape(-1)])
        counts += np.bincount(ids, minlength=len(counts))
    expected = sorted(range(len(counts)), key=lambda index: (-counts[index], index))
    assert cache.ranks.classes.tolist() == expected  # the sample is the whole corpus


def test_channel_statistics_are_those_of_the_stored_states(capture, tmp_path):
    cache = open_cache(capture(**SMALL, hidden_layers=(-1, 0)))
    for layer in (-1, 0):
        blocks = [cache.read_block(n, hidden_layers=(layer,)) for n in range(cache.num_blocks)]
        bits = np.concatenate([block.hidden[layer] for block in blocks]).astype(np.uint32) << 16
        states_ND = torch.from_numpy(bits.view(np.float32)).double()
        # float32 in the file; the states of the calibration were batched otherwise: bf16 rounding
        torch.testing.assert_close(
            cache.channel_deviation(layer).double(), states_ND.std(0, unbiased=False),
            rtol=1e-3, atol=1e-5,
        )  # fmt: skip


def test_no_file_of_a_cache_names_a_place_or_a_host(options, small_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "a-host-with-a-long-name")
    run(CaptureConfig(**options | {"out": tmp_path / "elsewhere"}))
    first, second = content(small_dir), content(tmp_path / "elsewhere")
    assert first == second
    for word in (str(tmp_path.parent), str(small_dir.parent.parent), socket.gethostname()):
        assert all(word.encode() not in data for data in first.values())


def test_the_cached_tokenizer_is_the_teachers(small_dir, tokenizer_dir):
    cached = AutoTokenizer.from_pretrained(small_dir / "tokenizer")
    text = "the day of many words, ☃"
    assert (
        cached(text)["input_ids"] == AutoTokenizer.from_pretrained(tokenizer_dir)(text)["input_ids"]
    )


def test_how_the_tokenizer_was_found_is_no_part_of_the_cache(small_dir):
    """Else an offline process and one with a network would publish different manifests."""
    settings = json.loads((small_dir / "tokenizer" / "tokenizer_config.json").read_text())
    assert set(settings) & {"is_local", "local_files_only", "name_or_path"} == set()


def test_side_files_of_a_start_that_was_cut_short_do_not_spoil_another_job(
    options, small_dir, tmp_path
):
    """The first start died before its manifest; then another tokenizer was asked for."""
    leftover = options["out"] / "tokenizer" / "tokenizer.json"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("{}")
    run(CaptureConfig(**options))
    assert open_cache(options["out"]).cache_id == open_cache(small_dir).cache_id
