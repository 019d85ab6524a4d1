"""Every task through the commands on real rows: teacher, cache, student, evaluation, export.

The teacher is trained with the tool itself, on a cache of hard labels, except where it has none.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, LlamaConfig, MarianConfig, PreTrainedTokenizerFast

from shared.cache import open_cache
from shared.options import main
from shared.tasks import TASKS

DATA = Path(__file__).parent / "data"
BOOK = Path(__file__).parent.parent / "benchmarks" / "data" / "jane-eyre.txt"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<|user|>", "<|assistant|>")
CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '[SEP]' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Case:
    """`metric` is what `evaluate` must report; `generated`: the teacher writes the targets."""

    task: str
    file: str
    metric: str
    options: tuple[str, ...] = ()
    generated: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()
    formats: tuple[str, ...] = ("safetensors",)

    @property
    def corpus(self) -> Path:
        return BOOK if self.file == "jane-eyre" else DATA / f"{self.file}.jsonl"


WRITING = ("--generate", "--generate-rows=4", "--max-new-tokens=8")
CASES = {
    "tags": Case("token-classification", "ner_en_wnut17", "entity_f1", formats=("int8",)),
    "classes": Case(
        "sequence-classification", "classify_en_banking77", "accuracy", formats=("onnx", "int8")
    ),
    "questions": Case(
        "question-answering", "qa_en_covidqa", "f1", ("--max-length=96", "--stride=16")
    ),
    "translation": Case(
        "seq2seq-lm",
        "translate_en_zh_tatoeba",
        "chrf",
        ("--columns=source=en", "--columns=target=zh", "--max-target-length=48"),
        generated=("--max-new-tokens=8", "--num-beams=2"),
        evaluation=WRITING,
    ),
    "summaries": Case(
        "seq2seq-lm", "summarise_en_scitldr", "chrf", ("--max-length=256",), evaluation=WRITING
    ),
    "dialogue": Case("causal-lm", "dialogue_zh_crosswoz", "loss", ("--max-length=256",)),
    "instructions": Case(
        "causal-lm",
        "instruct_en_gsm8k",
        "loss",
        ("--max-length=512",),
        generated=("--max-new-tokens=12", "--sample-temperature=0.8"),
    ),
    "masks": Case("masked-lm", "jane-eyre", "loss", ("--limit-documents=40", "--max-length=64")),
    "vectors": Case(
        "feature-extraction", "jane-eyre", "cosine", ("--limit-documents=60", "--max-length=48")
    ),
}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    """Word pieces of all the rows, with BERT's special tokens and a chat template."""
    folder = tmp_path_factory.mktemp("tasks") / "tokenizer"
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=list(SPECIAL))
    lines = [
        json.dumps(json.loads(line), ensure_ascii=False)
        for path in sorted(DATA.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    tokenizer.train_from_iterator([*lines, BOOK.read_text(encoding="utf-8")[:50_000]], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        eos_token="[SEP]",
        extra_special_tokens=["<|user|>", "<|assistant|>"],
    )
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    return folder


def write_config(folder, task, width, tokenizer_dir):
    """A model from scratch: an encoder, a decoder or both, of two layers."""
    ids = len(PreTrainedTokenizerFast.from_pretrained(tokenizer_dir))
    shape = {"vocab_size": ids, "max_position_embeddings": 512, "pad_token_id": 0}
    if task == "seq2seq-lm":
        config = MarianConfig(
            **shape,
            d_model=width,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=2 * width,
            decoder_ffn_dim=2 * width,
            eos_token_id=3,
            bos_token_id=None,
            decoder_start_token_id=0,
            forced_eos_token_id=None,
        )
    elif task == "causal-lm":
        config = LlamaConfig(
            **shape,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            bos_token_id=None,
            eos_token_id=3,
        )
    else:
        config = BertConfig(
            **shape,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            hidden_dropout_prob=0.0,
        )
    config.save_pretrained(folder)
    return folder


def call(capsys, program, *arguments):
    """Runs a command in this process; its standard output."""
    if program == "cache-teacher":
        from teacher_cache.cli import app
    else:
        from student_train.cli import app
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(app, [str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert not ended.value.code, printed.out + printed.err
    return printed.out


def make_teacher(capsys, case, tmp_path, tokenizer_dir):
    """Trained on hard labels; of vectors, which have none, random."""
    config = write_config(tmp_path / "teacher-config", case.task, 48, tokenizer_dir)
    teacher = tmp_path / "teacher"
    if TASKS[case.task].target_space == "states":
        torch.manual_seed(0)
        model_config = transformers.AutoConfig.from_pretrained(config)
        transformers.AutoModel.from_config(model_config).save_pretrained(teacher)
        PreTrainedTokenizerFast.from_pretrained(tokenizer_dir).save_pretrained(teacher)
        return teacher
    common = ("run", "--task", case.task, "--corpus", case.corpus, *case.options)
    labels = ("--targets=none", "--tokenizer", tokenizer_dir, "--out", tmp_path / "labels")
    call(capsys, "cache-teacher", *common, *labels)
    call(
        capsys,
        "train-student",
        *("run", "--student", config, "--cache", tmp_path / "labels", "--out", teacher),
        *("--soft-weight=0", "--hard-weight=1", "--max-steps=6", "--learning-rate=3e-3"),
    )
    return teacher


@pytest.mark.parametrize("name", CASES)
def test_a_task_through_all_commands(name, capsys, tmp_path, tokenizer_dir):
    case = CASES[name]
    teacher = make_teacher(capsys, case, tmp_path, tokenizer_dir)
    cache, run, exported = (tmp_path / part for part in ("cache", "run", "exported"))
    written = ("--generate", *case.generated) if case.generated else ()
    options = [o for o in case.options if not (written and o.startswith("--max-target-length"))]
    call(
        capsys,
        "cache-teacher",
        *("run", "--task", case.task, "--teacher", teacher, "--corpus", case.corpus),
        *(*options, *written, "--out", cache),
    )
    call(capsys, "cache-teacher", "check", cache, "--teacher", teacher, "--rows=8")
    assert open_cache(cache).manifest.task == case.task
    config = write_config(tmp_path / "student-config", case.task, 32, tokenizer_dir)
    call(
        capsys,
        "train-student",
        *("run", "--student", config, "--cache", cache, "--validation-cache", cache),
        *("--out", run, "--max-steps=8", "--learning-rate=3e-3"),
    )
    result = json.loads((run / "result.json").read_text())
    assert result["validation"]["loss"] < result["before"]["loss"]
    evaluation = ("evaluate", "--student", run, "--cache", cache, "--json", *case.evaluation)
    numbers = json.loads(call(capsys, "train-student", *evaluation))
    assert numbers.get("metric", "loss") == case.metric
    assert numbers["loss"] == pytest.approx(result["validation"]["loss"], rel=1e-4)
    formats = [f"--format={each}" for each in ("safetensors", *case.formats)]
    call(capsys, "train-student", "export", run, "--out", exported, *formats, "--rows=8")
    report = json.loads((exported / "export.json").read_text())
    plain = next(each for each in report["files"] if each["format"] == "safetensors")
    assert plain["check"]["max_difference"] < 1e-5
    assert plain["check"]["decisions"] > 0
    auto = getattr(transformers, TASKS[case.task].auto_class)
    model = auto.from_pretrained(exported)
    assert sum(p.numel() for p in model.parameters()) == report["parameters"]
    assert (exported / "README.md").read_text().startswith("---")
