"""Conversations: only what the assistant says is predicted, in text, tokens, cache and student."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.cache import open_cache
from shared.errors import CorpusError
from student_train.config import TrainConfig
from student_train.run.run import run as train
from teacher_cache.config import CaptureConfig, CheckConfig
from teacher_cache.corpus.chat import encode_conversation, encode_exchange
from teacher_cache.corpus.documents import Conversation, Exchange
from teacher_cache.corpus.sources import open_corpus
from teacher_cache.tasks.causal import build
from teacher_cache.tools.check.check import check

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
MARKED = """{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}
{%- generation %}{{ m.content + '<|end|>' }}{% endgeneration %}
{%- else %}{{ m.content }}{% endif %}{% endfor %}"""
NO_PROMPT = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|end|>' }}{% endfor %}"
FORGETFUL = """{% for m in messages %}{% if m.role != 'assistant' or loop.last %}
{{- m.role + ': ' + m.content + '<|end|>' }}{% endif %}{% endfor %}"""
TEMPLATES = {
    "chatml": (CHATML, "{}<|im_end|>"),
    "marked": (MARKED, "{}<|end|>"),
    "no generation prompt": (NO_PROMPT, "assistant: {}<|end|>"),
}
MESSAGES = (
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "how are you"},
    {"role": "assistant", "content": "very well"},
    {"role": "user", "content": "come and look  "},
    {"role": "assistant", "content": "so long"},
)


@pytest.fixture
def tokenizer(tokenizer_dir):
    return AutoTokenizer.from_pretrained(tokenizer_dir)


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_only_the_assistant_is_predicted_with_its_end_of_turn(tokenizer, name):
    template, said = TEMPLATES[name]
    tokenizer.chat_template = template
    spoken = encode_conversation(Conversation(MESSAGES), tokenizer, "here")
    whole = tokenizer.apply_chat_template(list(MESSAGES), tokenize=False)
    assert tokenizer.decode(spoken.input_ids) == whole
    edges = np.flatnonzero(np.diff(np.concatenate([[0], spoken.by_assistant.astype(int), [0]])))
    turns = [tokenizer.decode(spoken.input_ids[a:b]) for a, b in edges.reshape(-1, 2)]
    assert turns == [said.format("very well"), said.format("so long")]


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_way_out(tokenizer):
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(CorpusError, match=r"here: .* message 2 another way.*\{% generation %\}"):
        encode_conversation(Conversation(MESSAGES), tokenizer, "here")


def test_a_template_that_refuses_the_messages_says_where(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CorpusError, match=r"document 3: .*roles must alternate"):
        encode_conversation(Conversation(MESSAGES), tokenizer, "document 3")


def test_without_a_template_a_completion_follows_its_prompt(tokenizer):
    exchange = Exchange("how are", " you two")
    spoken = encode_exchange(exchange, tokenizer, ((), (0,)))
    assert tokenizer.decode(spoken.input_ids[~spoken.by_assistant]) == "how are"
    assert tokenizer.decode(spoken.input_ids[spoken.by_assistant]) == " you two<|end|>"
    apart = encode_exchange(Exchange("how are", "you two"), tokenizer, ((), (0,)))
    assert tokenizer.decode(apart.input_ids) == "how are\nyou two<|end|>"


def preprocessing(**changes):
    from shared.format.manifest import Preprocessing

    options = {
        "split": "train",
        "columns": ("messages=messages",),
        "sample_by": "line",
        "encoding_errors": "strict",
        "limit_documents": 0,
        "max_length": 64,
        "pack": False,
    }
    return Preprocessing(**options | changes)


def test_positions_are_the_tokens_before_what_the_assistant_says(tokenizer):
    tokenizer.chat_template = CHATML
    spoken = encode_conversation(Conversation(MESSAGES), tokenizer, "here")
    document = (5, Conversation(MESSAGES))
    long = len(spoken.input_ids)
    (row,) = build([document], tokenizer, preprocessing(max_length=long), Counter())
    assert row.supervised.tolist() == (np.flatnonzero(spoken.by_assistant) - 1).tolist()
    counters = Counter()
    cut = list(build([document], tokenizer, preprocessing(max_length=16), counters))
    predicted = [(row.row_id & 0xFFFFFF) * 16 + t + 1 for row in cut for t in row.supervised]
    expected = [t for t in np.flatnonzero(spoken.by_assistant).tolist() if t % 16]
    assert predicted == expected
    assert all(len(row.supervised) for row in cut)
    assert counters["rows_without_targets"] == -(-long // 16) - len(cut)
    assert counters["cut_documents"] == 1


def test_packed_conversations_keep_their_positions(tokenizer):
    tokenizer.chat_template = CHATML
    documents = [(i, Conversation(MESSAGES[: 3 + 2 * (i % 2)])) for i in range(6)]
    alone = list(build(documents, tokenizer, preprocessing(max_length=400), Counter()))
    packed = list(build(documents, tokenizer, preprocessing(max_length=400, pack=True), Counter()))
    assert len(packed) < len(alone)
    found = sorted(row.input_ids[t + 1] for row in packed for t in row.supervised)
    assert found == sorted(row.input_ids[t + 1] for row in alone for t in row.supervised)


@pytest.fixture(scope="module")
def chat_files(tmp_path_factory, teacher_dir) -> tuple[Path, Path]:
    """A corpus of 40 conversations, and the teacher with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    teacher = Path(shutil.copytree(teacher_dir, folder / "teacher"))
    (teacher / "chat_template.jinja").write_text(CHATML)
    lines = [
        json.dumps({"id": i, "messages": [dict(m) for m in MESSAGES[: 3 + 2 * (i % 2)]]})
        for i in range(40)
    ]
    lines[7] = json.dumps({"id": 7, "messages": []})
    lines[8] = json.dumps({"id": 8, "messages": [{"role": "user", "content": "so"}]})
    (folder / "chat.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "chat.jsonl", teacher


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("kind", ["topk", "sample"])
def test_a_cache_of_chats_holds_the_live_teacher_at_these_positions_only(
    chat_files, capture, pack, kind
):
    corpus, teacher = chat_files
    size = {"top_k": 8} if kind == "topk" else {"mean_entries": 8.0}
    path = capture(
        corpus=str(corpus), teacher=str(teacher), max_length=128, targets=kind, pack=pack, **size
    )
    cache = open_cache(path)
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    said = 0
    for row in cache:
        labels = row.input_ids[row.positions + 1]
        assert torch.equal(row.labels, labels)
        said += tokenizer.decode(labels).count("<|im_end|>")
        assert "im_start" not in tokenizer.decode(labels)
        if pack:
            continue
        with torch.no_grad():
            live = model(row.input_ids[None]).logits[0].log_softmax(-1)[row.positions]
        if kind == "topk":
            cached = row.targets.logprobs
            assert torch.allclose(live.gather(1, row.targets.ids), cached, atol=0.05)
    assert said == 19 * 1 + 19 * 2 + 1 - 1  # 40 conversations, less an empty and a silent one
    counters = Counter()
    for commit in cache.commits:
        counters.update(commit.statistics)
    assert counters["empty_documents"] == 1
    assert counters["rows_without_targets"] == 1
    assert check(CheckConfig(cache=path, teacher=str(teacher), device="cpu")).sound


def test_prompts_cost_no_target_bytes_and_a_student_trains(
    chat_files, capture, student_config_dir, tmp_path
):
    corpus, teacher = chat_files
    path = capture(corpus=str(corpus), teacher=str(teacher), max_length=128)
    cache = open_cache(path)
    tokens = sum(commit.tokens for commit in cache.commits)
    positions = sum(commit.positions for commit in cache.commits)
    assert positions < tokens / 3
    result = train(
        TrainConfig(
            student=str(student_config_dir),
            cache=(path,),
            validation_cache=path,
            out=tmp_path / "run",
            max_steps=4,
            batch_tokens=1000,
            device="cpu",
        )
    )
    assert result["validation"]["positions"] == positions


def test_columns_are_guessed_or_named(tmp_path, tokenizer_dir):
    rows = [{"question": "how", "answer": "so"}, {"question": "who", "answer": None}]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def corpus(**options):
        defaults = {"corpus": str(tmp_path / "qa.jsonl"), "targets": "none", "tokenizer": "x"}
        return open_corpus(CaptureConfig(out=tmp_path / "c", **defaults | options))

    assert corpus().columns == {"prompt": "question", "completion": "answer"}
    assert corpus().read([0, 1]) == [Exchange("how", "so"), Exchange("who", "")]
    assert corpus(columns=("text=answer",)).read([0]) == ["so"]
    assert corpus(columns=("completion=answer",)).columns["prompt"] == "question"
    with pytest.raises(CorpusError, match="no column 'reply'; there are question, answer"):
        corpus(columns=("completion=reply",))
    with pytest.raises(CorpusError, match="a document is messages, or text, or prompt and"):
        corpus(columns=("text=answer", "prompt=question"))
    with pytest.raises(CorpusError, match="reads the roles messages, text, prompt, completion"):
        corpus(columns=("label=answer",))


def test_a_broken_message_names_document_and_message(tmp_path):
    rows = [{"messages": [{"content": "no role"}]}]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = CaptureConfig(
        corpus=str(tmp_path / "chat.jsonl"), out=tmp_path / "c", targets="none", tokenizer="x"
    )
    with pytest.raises(CorpusError, match="document 0, message 0 of column 'messages'"):
        open_corpus(config).read([0])


def test_messages_without_a_template_say_what_to_do(chat_files, tokenizer_dir, tmp_path):
    from teacher_cache.job.run import run

    corpus, _ = chat_files
    config = CaptureConfig(
        corpus=str(corpus), out=tmp_path / "c", targets="none", tokenizer=str(tokenizer_dir)
    )
    with pytest.raises(CorpusError, match=r"has no chat template.*chat_template\.jinja"):
        run(config)
