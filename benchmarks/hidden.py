"""How far stored hidden states are from the teacher's, for each codec; prints one JSON line.

    python benchmarks/hidden.py [--corpus FILE] [--steps 300] [--model DIR]

A small Llama is trained on the text with the tool itself (or an own one is taken with --model), and
its states are captured with every codec. They are held against those of plain `transformers`, one
row at a time in float32; so the error of bf16 is that of its rounding, and what batching changes in
the last bits. Errors are relative, by the length of a position's state. `massive` repeats the
measurement with a number 1,000 times as large as a typical one put into the first position of every
row, as many large models have it.

Bytes are those of the frames. Speed is that of one thread reading whole blocks, frames and all
checks included, with nothing but token ids and the states of one layer.

S states, D channels.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from shared import open_cache
from shared.cache import Cache
from shared.targets import hidden
from shared.targets.hidden import ChannelStatistics, int8_scale, without_massive
from shared.tasks import HiddenCodec
from student_train.config import TrainConfig
from student_train.run.run import run as train
from teacher_cache.config import CaptureConfig
from teacher_cache.job.run import run as capture
from teacher_cache.tools.inspect import summary

BOOK = Path(__file__).resolve().parent / "data" / "jane-eyre.txt"
CODECS: tuple[HiddenCodec, ...] = ("bf16", "fp8", "int8")
GOALS = {"bf16": 0.002, "fp8": 0.04, "int8": 0.015}  # of the mean error
VOCABULARY, LENGTH = 1024, 128
MASSIVE = 1000


def main() -> None:
    """Trains, captures with each codec, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=BOOK)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--model", type=Path, help="a saved model with a tokenizer, not to train")
    parser.add_argument("--documents", type=int, default=200, help="that are captured")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        teacher = args.model or trained(args, out)
        print(json.dumps(measured(args, teacher, out)))


def trained(args: argparse.Namespace, out: Path) -> Path:
    """A small Llama from scratch: a cache of hard labels, and the hard loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(args.corpus)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.save_pretrained(out / "tokenizer")
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=None,
        eos_token_id=0,
    ).save_pretrained(out / "config")
    capture(
        CaptureConfig(
            **corpus_options(args, 0),
            targets="none",
            tokenizer=str(out / "tokenizer"),
            out=out / "labels",
        )
    )
    train(
        TrainConfig(
            student=str(out / "config"),
            cache=(out / "labels",),
            out=out / "teacher",
            soft_weight=0,
            hard_weight=1,
            max_steps=args.steps,
            batch_tokens=1024,
            learning_rate=4e-3,
        )
    )
    return out / "teacher"


def corpus_options(args: argparse.Namespace, documents: int) -> dict[str, Any]:
    return {
        "corpus": str(args.corpus),
        "sample_by": "line",
        "max_length": LENGTH,
        "limit_documents": documents,
    }


def measured(args: argparse.Namespace, teacher: Path, out: Path) -> dict[str, Any]:
    """Every number of the report."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    depth = model.config.num_hidden_layers
    layers = (depth // 3, 2 * depth // 3, -1)
    common = corpus_options(args, args.documents) | {"teacher": str(teacher), "top_k": 8}
    common |= {"hidden_layers": layers}
    caches: dict[HiddenCodec, Cache] = {}
    for codec in CODECS:
        config = CaptureConfig(**common, out=out / codec, hidden_codec=codec, dtype="float32")
        capture(config)
        caches[codec] = open_cache(config.out)
    truth = live_states(model, caches["bf16"], layers)
    results = [
        result(cache, codec, layer, truth[layer])
        for codec, cache in caches.items()
        for layer in layers
    ]
    capture(CaptureConfig(**common, out=out / "half", dtype="bfloat16"))
    half = summary(open_cache(out / "half"))["hidden_error"]
    goals = {
        codec: all(each["error_mean"] <= goal for each in results if each["codec"] == codec)
        for codec, goal in GOALS.items()
    }
    goals["bf16 of a bfloat16 teacher is exact"] = all(not e["worst"] for e in half.values())
    goals["fp8 worst 6.25 %"] = all(
        max(each["error_worst"], each["massive"]["error_worst"]) <= 0.0625
        for each in results
        if each["codec"] == "fp8"
    )
    return {
        "benchmark": "hidden",
        "command": " ".join(["python", "benchmarks/hidden.py", *sys.argv[1:]]),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "teacher_loss": round(summary(caches["bf16"])["teacher_loss"], 3),
        "width": model.config.hidden_size,
        "positions": len(truth[-1]),
        "results": results,
        "goals": goals,
    }


def live_states(model: Any, cache: Cache, layers: tuple[int, ...]) -> dict[int, np.ndarray]:
    """The states of every row's positions by plain transformers, float32 [S, D] by layer."""
    kept: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    with torch.no_grad():
        for row in cache:
            states = model(input_ids=row.input_ids[None], output_hidden_states=True).hidden_states
            for layer in layers:
                index = -1 if layer == -1 else layer + 1  # transformers begins with the embeddings
                kept[layer].append(states[index][0, row.hidden_positions])
    return {layer: torch.cat(parts).numpy() for layer, parts in kept.items()}


def result(cache: Cache, codec: HiddenCodec, layer: int, truth_SD: np.ndarray) -> dict[str, Any]:
    """One codec on one layer."""
    decoded_SD = np.concatenate([block_states(cache, n, layer) for n in range(cache.num_blocks)])
    stored = summary(cache)
    firsts = np.cumsum(cache.row_positions) - cache.row_positions
    return {
        "codec": codec,
        "layer": layer,
        **errors(hidden.bf16_to_float32(decoded_SD), truth_SD),
        "error_in_commits": {k: rounded(v) for k, v in stored["hidden_error"][str(layer)].items()},
        "bytes_per_position": round(stored["column_bytes_per_position"][f"hidden.{layer}"], 1),
        "read_positions_per_s": read_speed(cache, layer),
        "massive": massive(codec, truth_SD, firsts),
    }


def block_states(cache: Cache, block: int, layer: int) -> np.ndarray:
    return cache.read_block(block, hidden_layers=(layer,), targets=False).hidden[layer]


def errors(found_SD: np.ndarray, truth_SD: np.ndarray) -> dict[str, float]:
    """Relative errors of the positions: mean and worst."""
    error_S = np.linalg.norm(found_SD - truth_SD, axis=1) / np.linalg.norm(truth_SD, axis=1)
    return {"error_mean": rounded(error_S.mean()), "error_worst": rounded(error_S.max())}


def massive(codec: HiddenCodec, truth_SD: np.ndarray, firsts: np.ndarray) -> dict[str, float]:
    """The same with a massive number in the first position of every row."""
    states_SD = truth_SD.copy()
    states_SD[firsts, 7] = MASSIVE * np.sqrt(np.mean(np.square(truth_SD)))
    bits = torch.from_numpy(states_SD).to(torch.bfloat16).view(torch.uint16).numpy()
    scale = int8_scale(ChannelStatistics.of(without_massive(bits)))
    width = states_SD.shape[1]
    decoded = hidden.decode(hidden.encode(bits, codec, scale), codec, width, scale)
    return errors(hidden.bf16_to_float32(decoded), states_SD)


def read_speed(cache: Cache, layer: int) -> int:
    """Positions per second of this thread's CPU time, the median of 7 passes."""
    seconds = []
    for _ in range(8):
        start = time.thread_time()
        for block in range(cache.num_blocks):
            block_states(cache, block, layer)
        seconds.append(time.thread_time() - start)
    return round(int(cache.row_positions.sum()) / statistics.median(seconds[1:]))


def rounded(value: float) -> float:
    return float(f"{value:.3g}")


if __name__ == "__main__":
    main()
