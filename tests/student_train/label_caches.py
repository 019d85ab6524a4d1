"""Caches of label spaces without stage one: rows and targets are written as the contract says."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from shared.format import manifest_file
from shared.format.blocks import Block
from shared.format.column import Contents
from shared.format.commits import file_hash
from shared.format.manifest import HiddenSpec
from shared.format.schema import columns_of
from shared.format.writer import ShardWriter, encode_block
from shared.models.tokenizer import describe
from shared.storage.local import LocalStorage
from shared.targets.record import ClassRanks, Target
from shared.targets.spec import TargetSpec
from shared.tasks import TaskName
from tests.shared.format.test_manifest import make_manifest

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
CLASSES = ("bad", "fair", "good")
LABELS: dict[TaskName, tuple[str, ...]] = {
    "token-classification": TAGS,
    "sequence-classification": CLASSES,
}
NO_HIDDEN = HiddenSpec(layers=(), widths=(), codec="bf16")
ROWS_PER_BLOCK = 40


@dataclass(frozen=True)
class Example:
    """One row: tokens, which of two texts each is of, and the labelled ones with their class."""

    ids: np.ndarray
    types: np.ndarray
    positions: np.ndarray
    labels: np.ndarray


def bert_config(**changes: Any) -> BertConfig:
    """Two layers of 32 channels over 300 tokens, no dropout."""
    options: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return BertConfig(**options | changes)


def make_teacher(task: TaskName) -> Any:
    """A random one whose distributions are far from flat, and differ from row to row."""
    torch.manual_seed(0)
    names = dict(enumerate(LABELS[task]))
    config = bert_config(id2label=names, label2id={name: index for index, name in names.items()})
    of_tokens = task == "token-classification"
    model = (BertForTokenClassification if of_tokens else BertForSequenceClassification)(config)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.mul_(20)
        model.classifier.weight.mul_(40)
    return model.eval()


def make_rows(task: TaskName, count: int, seed: int = 0) -> list[Example]:
    """3 to 30 tokens each; about half of them labelled, as if the rest were inner word pieces.

    The class follows from the token, or is that of half the tokens of a row, so that a student can
    learn it.
    """
    rng = np.random.default_rng(seed)
    rows, classes = [], len(LABELS[task])
    for _ in range(count):
        ids = rng.integers(1, 300, rng.integers(3, 31)).astype(np.int32)
        types = (np.arange(len(ids)) >= len(ids) // 2).astype(np.int32)
        inner = np.arange(1, len(ids) - 1)
        positions = inner[(ids[inner] % 2 == 0) | (inner == 1)]
        labels = ids[positions] // 2 % classes
        if task == "sequence-classification":
            positions, labels = np.zeros(1, np.int64), rng.integers(0, classes, 1)
            of_class = 1 + 10 * labels + rng.integers(0, 10, len(ids))
            ids = np.where(rng.random(len(ids)) < 0.5, of_class, ids).astype(np.int32)
        rows.append(Example(ids, types, positions.astype(np.int32), labels.astype(np.int32)))
    return rows


def logits_at(model: Any, row: Example) -> torch.Tensor:
    """The model's own logits [P, C] at the positions of one row alone, without padding."""
    inputs = {"input_ids": torch.from_numpy(row.ids).long()[None]}
    if model.config.get_text_config().model_type == "bert":
        inputs["token_type_ids"] = torch.from_numpy(row.types).long()[None]
    logits = model(**inputs).logits
    return logits if logits.dim() == 2 else logits[0, torch.from_numpy(row.positions).long()]


def write_cache(
    path: Path,
    tokenizer_dir: Path,
    task: TaskName,
    rows: list[Example],
    teacher: Any = None,
    *,
    labels: tuple[str, ...] = (),
    labelled: bool = True,
) -> Path:
    """Two shards of blocks of `ROWS_PER_BLOCK`; without a teacher hard labels only."""
    storage, names = LocalStorage(path), labels or LABELS[task]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.save_pretrained(path / "tokenizer")
    files = [file for file in (path / "tokenizer").iterdir() if file.is_file()]
    spec = TargetSpec(kind="none" if teacher is None else "dense", num_classes=len(names))
    base = make_manifest()
    manifest = replace(
        base,
        task=task,
        labels=names,
        teacher=None if teacher is None else base.teacher,
        tokenizer=describe(tokenizer),
        targets=spec,
        hidden=NO_HIDDEN,
        labelled=labelled,
        columns=tuple(
            columns_of(
                Contents(
                    segments=False,
                    positions=True,
                    labels=labelled,
                    targets=teacher is not None,
                    label_logprob=labelled,
                    token_types=True,
                )
            )
        ),
        plan=replace(base.plan, num_shards=2),
        side_files={f"tokenizer/{file.name}": file_hash(file) for file in files},
    )
    manifest_file.publish(storage, manifest)
    own = np.arange(len(names), dtype=np.uint32)
    for shard in range(2):
        with ShardWriter(storage, manifest, manifest.cache_id, shard) as writer:
            numbered = list(enumerate(rows))[shard::2]
            sums = np.zeros(2)
            for number, first in enumerate(range(0, len(numbered), ROWS_PER_BLOCK)):
                block = _block(numbered[first : first + ROWS_PER_BLOCK], teacher)
                if not labelled:
                    block = replace(block, labels=None, label_logprob=None)
                if block.label_logprob is not None and block.entropy is not None:
                    sums += (block.label_logprob.sum(), block.entropy.sum())
                writer.write(encode_block(block, number, manifest, ClassRanks(own, own)))
            if teacher is not None:
                writer.statistics = {"sum_label_logprob": sums[0], "sum_entropy": sums[1]}
    return path


def _block(numbered: list[tuple[int, Example]], teacher: Any) -> Block:
    rows = [row for _, row in numbered]
    block = Block(
        row_ids=np.array([number << 24 for number, _ in numbered], np.uint64),
        num_tokens=np.array([len(row.ids) for row in rows], np.int32),
        num_positions=np.array([len(row.positions) for row in rows], np.int32),
        input_ids=np.concatenate([row.ids for row in rows]),
        positions=np.concatenate([row.positions for row in rows]),
        token_type_ids=np.concatenate([row.types for row in rows]),
        labels=np.concatenate([row.labels for row in rows]),
    )
    if teacher is None:
        return block
    with torch.no_grad():
        logits_PC = torch.cat([logits_at(teacher, row) for row in rows]).double()
    logprobs_PC = logits_PC.log_softmax(-1).numpy()
    P, C = logprobs_PC.shape
    ids_PC = np.tile(np.arange(C, dtype=np.int32), (P, 1))
    no_tail_P = np.full(P, -np.inf, np.float32)
    block.target = Target(ids_PC, logprobs_PC.astype(np.float32), no_tail_P)
    block.label_logprob = logprobs_PC[np.arange(P), block.labels].astype(np.float32)
    block.entropy = -(np.exp(logprobs_PC) * logprobs_PC).sum(1).astype(np.float32)
    return block
