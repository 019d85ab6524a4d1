"""Small corpora, tokenizers, teachers and students for unchanged.py, made without this project.

Texts are real rows of tests/data. Teachers are random, with distributions far from flat, and two
blocks of 32 channels; students are a config.json and start from scratch, with dropout.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    BartConfig,
    BertConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)

TOPICS = ("card", "cash", "fee", "lost", "pin", "refund")
_BPE_IDS, _PIECES = 400, 600  # ids of the byte-level tokenizer, word pieces of the other
_END, _PAD, _UNKNOWN = "<|end|>", "<|pad|>", "<|unknown|>"
_MARKED = (  # says itself what the assistant generates
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_UNMARKED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

Rows = list[dict[str, Any]]


def make_props(folder: Path, data: Path) -> None:
    """Writes corpora, teachers/, students/ and tokenizer/ into a folder."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True)
    rows = {file.stem: _read(file) for file in sorted(data.glob("*.jsonl"))}
    texts = _write_corpora(folder, rows)
    classes = {
        "token-classification": sorted(
            {tag for row in rows["ner_en_wnut17"] for tag in row["tags"]}
        ),
        "sequence-classification": sorted(
            {row["label_name"] for row in rows["classify_en_banking77"]}
        ),
    }
    _write_llamas(folder, texts)
    _write_berts(folder, texts, classes)
    _write_encoder_decoders(folder, texts)


def _read(file: Path) -> Rows:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# ---- Corpora


def _write_corpora(folder: Path, rows: dict[str, Rows]) -> list[str]:
    """A file for each way a document can look; gives back the lines of text.txt."""
    questions, reviews = rows["qa_en_covidqa"], rows["summarise_en_scitldr"]
    banking, sums = rows["classify_en_banking77"], rows["instruct_en_gsm8k"]
    texts = [row["context"] for row in questions] + [row["document"] for row in reviews]
    texts += [row["text"] for row in banking] + [row["answer"] for row in sums]
    lines = [" ".join(text.split()) for text in texts]
    lines[3], lines[5] = "", "so"  # an empty document, and one of a single token
    _write_text(folder / "text.txt", lines)
    _write_text(folder / "other.txt", [row["question"] for row in sums])
    for name in ("instruct_en_gsm8k", "dialogue_zh_crosswoz", "translate_en_zh_tatoeba"):
        _write(folder / f"{name}.jsonl", rows[name])
    for name in ("summarise_en_scitldr", "qa_en_covidqa", "ner_en_wnut17"):
        _write(folder / f"{name}.jsonl", rows[name])
    unanswered = [row | {"answers": None} for row in questions[:2]]
    _write(folder / "questions.jsonl", [*questions[:6], *unanswered])
    tagged = rows["ner_en_wnut17"]
    _write(folder / "words.jsonl", [{"tokens": row["tokens"]} for row in tagged])
    columns = (
        "\n".join(map("\t".join, zip(row["tokens"], row["tags"], strict=True))) for row in tagged
    )
    (folder / "tagged.conll").write_text("\n\n".join(columns) + "\n", encoding="utf-8")
    _write_labelled(folder, banking)
    return lines


def _write_labelled(folder: Path, banking: Rows) -> None:
    """Texts with one label, several, numbers, or none, and pairs of texts."""
    _write(folder / "one.jsonl", [_row(row, label=row["label_name"]) for row in banking])
    several = [
        _row(row, labels=[topic for topic in TOPICS if topic in row["text"].lower()])
        for row in banking
    ]
    several[7]["labels"] = None
    _write(folder / "several.jsonl", several)
    numbers = [_row(row, score=len(row["text"]) / 40) for row in banking]
    numbers[7]["score"] = None
    _write(folder / "numbers.jsonl", numbers)
    _write(folder / "no-labels.jsonl", [_row(row) for row in banking])
    pairs = [
        _row(row, text_pair=then["text"], label=row["label_name"])
        for row, then in pairwise(banking)
    ]
    _write(folder / "pairs.jsonl", pairs)


def _row(row: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"text": row["text"], **more}


def _write(file: Path, rows: Rows) -> None:
    _write_text(file, [json.dumps(row, ensure_ascii=False) for row in rows])


def _write_text(file: Path, lines: Sequence[str]) -> None:
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---- Tokenizers


def _bytes(texts: Sequence[str], *, ends: bool, template: str | None = None) -> Any:
    """A byte-level BPE; with `ends` a text gets the end token behind it, as of a T5."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [_PAD, _END, _UNKNOWN, "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=_BPE_IDS,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {_END}", special_tokens=[(_END, 1)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_END, pad_token=_PAD, unk_token=_UNKNOWN
    )
    fast.chat_template = template
    return fast


def _pieces(texts: Sequence[str]) -> Any:
    """Lower-cased word pieces between [CLS] and [SEP], with types, as BERT has them."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=_PIECES, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


# ---- Models


def _write_llamas(folder: Path, texts: Sequence[str]) -> None:
    """Two teachers of one tokenizer, the first with two chat templates too, and a student."""
    plain = _bytes(texts, ends=False)
    options: dict[str, Any] = {
        "vocab_size": len(plain),
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    large = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    for seed, name in enumerate(("llama", "second-llama")):
        config = LlamaConfig(**options | large)
        _save(folder / "teachers" / name, "LlamaForCausalLM", config, plain, seed=seed)
    for name, template in (("marked-chat", _MARKED), ("chat", _UNMARKED)):
        chat = _bytes(texts, ends=False, template=template)
        config = LlamaConfig(**options | large)
        _save(folder / "teachers" / name, "LlamaForCausalLM", config, chat)
    plain.save_pretrained(folder / "tokenizer")
    student = LlamaConfig(**options | small, attention_dropout=0.1)
    student.save_pretrained(folder / "students" / "llama")


def _write_berts(folder: Path, texts: Sequence[str], classes: dict[str, list[str]]) -> None:
    """A teacher for each task that reads a whole text, and one student for all of them."""
    tokenizer = _pieces(texts)
    sequence = "BertForSequenceClassification"
    heads: dict[str, tuple[str, Sequence[str], dict[str, Any]]] = {
        "masked": ("BertForMaskedLM", (), {}),
        "tags": ("BertForTokenClassification", classes["token-classification"], {}),
        "one": (sequence, classes["sequence-classification"], {}),
        "several": (sequence, TOPICS, {"problem_type": "multi_label_classification"}),
        "numbers": (sequence, ("length",), {"problem_type": "regression"}),
        "questions": ("BertForQuestionAnswering", (), {}),
        "vectors": ("BertModel", (), {}),
    }
    for name, (head, labels, more) in heads.items():
        named = {"id2label": dict(enumerate(labels))} if labels else {}
        config = _bert(len(tokenizer), **named, **more)
        _save(folder / "teachers" / name, head, config, tokenizer)
    tokenizer.save_pretrained(folder / "pieces")
    small = {"num_hidden_layers": 1, "hidden_size": 16, "hidden_dropout_prob": 0.1}
    _bert(len(tokenizer), **small).save_pretrained(folder / "students" / "bert")


def _bert(num_ids: int, **changes: Any) -> BertConfig:
    options: dict[str, Any] = {
        "vocab_size": num_ids,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return BertConfig(**options | changes)


def _write_encoder_decoders(folder: Path, texts: Sequence[str]) -> None:
    """A T5, a BART, which has a bias behind its head, and a small T5 as the student."""
    tokenizer = _bytes(texts, ends=True)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1}
    ids["decoder_start_token_id"] = 0
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 3}
    t5 = T5Config(**ids | sizes | {"num_heads": 2, "dropout_rate": 0.0})
    _save(folder / "teachers" / "t5", "T5ForConditionalGeneration", t5, tokenizer)
    options: dict[str, Any] = {"d_model": 32, "max_position_embeddings": 128, "dropout": 0.0}
    for side in ("encoder", "decoder"):
        options |= {f"{side}_layers": 2, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 64}
    bart = BartConfig(**ids | options | {"init_std": 0.2, "forced_eos_token_id": None})
    _save(folder / "teachers" / "bart", "BartForConditionalGeneration", bart, tokenizer)
    small = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1}
    student = T5Config(**ids | small | {"num_heads": 2})
    student.architectures = ["T5ForConditionalGeneration"]
    student.save_pretrained(folder / "students" / "t5")


def _save(
    folder: Path, name: str, config: PretrainedConfig, tokenizer: Any, *, seed: int = 0
) -> None:
    """A random model whose head is made sharper, with its tokenizer."""
    torch.manual_seed(seed)
    made: PreTrainedModel = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in made.named_parameters():
            if any(part in parameter_name for part in ("lm_head", "classifier", "qa_outputs")):
                parameter.mul_(24)
            elif parameter_name == "shared.weight":
                parameter.mul_(3)
        if name.startswith("Bart"):
            made.final_logits_bias.normal_()
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
