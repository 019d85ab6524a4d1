"""Time and memory of capturing targets against what one would write without it.

    python benchmarks/capture.py --rows 4 --tokens 512 --v 50257 --d 256 --layers 4 --k 32

A Llama made on the spot, the same batch for all:
  ours      Teacher.forward, then select for each chunk of positions, as a job does it
  naive     model(...).logits, log_softmax in float32 over [B, T, V], torch.topk
  bare      model(...).logits, thrown away: what no capture can do without

Rounds alternate in one process; medians, of the clock and of the CPU time of all threads. On a
machine that does other things too, threads that spin while they wait spoil both: use --threads 1,
or set OMP_WAIT_POLICY=PASSIVE. Memory is the rise of the peak resident size in a process of its own
(Linux only). Prints one JSON line.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from shared.targets.spec import TargetSpec
from teacher_cache.engines.streamed_head import TeacherBatch
from teacher_cache.engines.teacher import Teacher
from teacher_cache.select.targets import select

VARIANTS = ("ours", "naive", "bare")


@dataclass(slots=True)
class Problem:
    teacher: Teacher
    batch: TeacherBatch
    labels_N: Tensor
    spec: TargetSpec
    chunk_positions: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--v", type=int, default=50_257)
    parser.add_argument("--d", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--temperature", type=float, nargs="*", default=[])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--chunk-positions", type=int, default=0, help="0: the teacher's own")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    problem = make_problem(args)
    if args.memory_of:
        print(measure_memory(problem, args.memory_of))
        return
    seconds, cpu_seconds = times_s(problem, args.rounds)
    extra = {variant: peak_extra_bytes(variant) for variant in VARIANTS}
    print(
        json.dumps(
            {
                "benchmark": "capture",
                "command": " ".join(["python", "benchmarks/capture.py", *sys.argv[1:]]),
                "seconds": {name: round(value, 3) for name, value in seconds.items()},
                "cpu_seconds": {name: round(value, 3) for name, value in cpu_seconds.items()},
                "positions_per_s": round(len(problem.labels_N) / seconds["ours"]),
                "speed_ours_over_naive": round(seconds["naive"] / seconds["ours"], 3),
                "speed_ours_over_bare": round(seconds["bare"] / seconds["ours"], 3),
                "cpu_naive_over_ours": round(cpu_seconds["naive"] / cpu_seconds["ours"], 3),
                "cpu_bare_over_ours": round(cpu_seconds["bare"] / cpu_seconds["ours"], 3),
                "peak_extra_mib": {name: round(value / 2**20, 1) for name, value in extra.items()},
                "memory_ours_over_naive": round(extra["ours"] / extra["naive"], 3),
                "positions": len(problem.labels_N),
                "chunk_positions": problem.chunk_positions,
                "hardware": hardware(),
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
            }
        )
    )


def make_problem(args: argparse.Namespace) -> Problem:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.v,
        hidden_size=args.d,
        intermediate_size=4 * args.d,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        max_position_embeddings=args.tokens,
        initializer_range=0.2,  # logits that spread, as a trained model's do
        dtype=args.dtype,
    )
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(args.v)}, "w0"))
    teacher = Teacher.wrap(
        AutoModelForCausalLM.from_config(config), PreTrainedTokenizerFast(tokenizer_object=words)
    )
    ids_BT = torch.randint(args.v, (args.rows, args.tokens))
    index_BT = torch.arange(ids_BT.numel()).view_as(ids_BT)
    return Problem(
        teacher=teacher,
        batch=TeacherBatch(
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            position_index=index_BT[:, :-1].flatten(),
        ),
        labels_N=ids_BT[:, 1:].flatten(),
        spec=TargetSpec(
            kind="topk",
            num_classes=args.v,
            top_k=args.k,
            value_bits=7,
            temperatures=tuple(args.temperature),
        ),
        chunk_positions=args.chunk_positions or teacher.chunk_positions,
    )


def ours(problem: Problem) -> list[Tensor]:
    output = problem.teacher.forward(problem.batch, chunk_positions=problem.chunk_positions)
    return [
        select(logits_nV, problem.spec, problem.labels_N[here]).logprobs
        for here, logits_nV in output.chunks
    ]


def naive(problem: Problem) -> Tensor:
    logits_BTV = bare(problem)
    return torch.log_softmax(logits_BTV.float(), dim=-1).topk(problem.spec.top_k).values


@torch.no_grad()
def bare(problem: Problem) -> Tensor:
    batch = problem.batch
    return problem.teacher.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).logits


def run(variant: str, problem: Problem) -> None:
    functions: dict[str, Callable[[Problem], object]] = {
        "ours": ours,
        "naive": naive,
        "bare": bare,
    }
    functions[variant](problem)


def times_s(problem: Problem, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    wall: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    cpu: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for round_number in range(rounds + 1):
        for variant in VARIANTS:
            start, cpu_start = time.perf_counter(), time.process_time()
            run(variant, problem)
            if round_number > 0:  # the first round warms up
                wall[variant].append(time.perf_counter() - start)
                cpu[variant].append(time.process_time() - cpu_start)
    wall_s, cpu_s = (
        {variant: statistics.median(values) for variant, values in table.items()}
        for table in (wall, cpu)
    )
    return wall_s, cpu_s


def peak_extra_bytes(variant: str) -> int:
    """Runs this script again for one variant, so that no other has touched its memory."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", variant]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(result.stdout.split()[-1])


def measure_memory(problem: Problem, variant: str) -> int:
    """The probes of `Teacher.wrap` have run: libraries hold their own buffers by now."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_bytes("VmRSS")
    run(variant, problem)
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise LookupError(field)


def hardware() -> dict[str, str | int]:
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    policy = os.environ.get("OMP_WAIT_POLICY", "default")
    return {"cpu": cpu, "threads": torch.get_num_threads(), "omp_wait_policy": policy}


if __name__ == "__main__":
    main()
