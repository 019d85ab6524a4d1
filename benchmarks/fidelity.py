"""Which kind of cached target makes good students; prints one JSON line, and tables to stderr.

    python benchmarks/fidelity.py --out DIR [--corpus FILE...] [--seeds 5] [--processes 2]
    python benchmarks/fidelity.py --samples DIR

The first trains a tokenizer, a teacher and a student for every arm and seed (`--arms` for some of
them) and compares them on held-out text. Each result is kept in DIR: run again to go on, or to add
arms and seeds. The second compares gradients of the output head with those of the whole
distribution, on the distributions of teachers (files as `codec.py` reads them).
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # two trainings of one thread beat one of two; children inherit
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import dataclasses
import json
import multiprocessing
import platform
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from codec import processor
from fidelity_gradient import measure_samples
from fidelity_report import picture, summarise, table
from fidelity_students import (
    ARMS,
    Sizes,
    bytes_per_token,
    evaluate,
    load_teacher,
    prepare,
    pretrain,
    same_settings,
    seconds_per_step,
    train,
)

BOOK = Path(__file__).resolve().parent / "data" / "jane-eyre.txt"
EXTRA = ("@T2", "full+hard0.5", "adaptive16-label", "sample12+hard0.5")  # not unless asked for


def main() -> None:
    """Runs one of the two and prints it."""
    args = parser().parse_args()
    if args.samples:
        body = {
            "gradients": measure_samples(args.samples, args.names, args.positions, args.entries)
        }
    elif args.out:
        body = students(args)
    else:
        sys.exit("name --out DIR to train students, or --samples DIR to compare gradients")
    print(json.dumps({"benchmark": "fidelity", **environment(), **body}))


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--samples", type=Path, help="folder of teacher distributions")
    options.add_argument("--names", nargs="+", default=["O32", "O151"], help="files of it")
    options.add_argument("--positions", type=int, default=5120, help="of each file, at most")
    options.add_argument("--entries", type=int, nargs="+", default=[4, 8, 12, 16, 32, 64])
    options.add_argument("--out", type=Path, help="folder of everything that is made")
    options.add_argument("--corpus", type=Path, nargs="+", default=[BOOK])
    options.add_argument("--arms", nargs="+", choices=list(ARMS), help="default: all but variants")
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--processes", type=int, default=1)
    options.add_argument("--picture", type=Path, help="an .svg file")
    options.add_argument("--no-timing", action="store_true", help="skip the pass of seconds a step")
    options.add_argument("--report-only", action="store_true", help="train nothing")
    for field in dataclasses.fields(Sizes):
        flag = "--" + field.name.replace("_", "-")
        options.add_argument(flag, type=type(field.default), default=field.default)
    return options


def students(args: argparse.Namespace) -> dict[str, Any]:
    """Trains what is missing, and sums up what is there."""
    sizes = Sizes(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Sizes)})
    names = args.arms or [name for name in ARMS if not name.endswith(EXTRA)]
    if args.picture and args.picture.suffix != ".svg":
        sys.exit(f"--picture {args.picture}: only .svg can be drawn")
    same_settings(args.out, sizes, args.corpus)
    if not args.report_only:
        torch.set_num_threads(args.processes)
        prepare(args.corpus, args.out, sizes, names)
        run_missing(args.out, sizes, names, args.seeds, args.processes)
    results = [r for r in read_results(results_file(args.out, sizes)) if r["arm"] in names]
    lines = summarise(results, names)
    seconds = {} if args.no_timing else seconds_per_step(args.out, sizes, names)
    for line in lines:
        line["bytes"] = bytes_per_token(args.out, line["arm"])
        if seconds:
            line["seconds_per_step"] = round(seconds[line["arm"]], 4)
            line["step_ratio"] = round(seconds[line["arm"]] / seconds["ce"], 3)
    teacher = evaluate(args.out, load_teacher(args.out), sizes)
    print(f"teacher: loss {teacher['loss']:.4f}, ECE {teacher['ece']:.2%}", file=sys.stderr)
    print(table(lines), file=sys.stderr)
    if args.picture:
        title = f"Students of one teacher, {args.seeds} seeds, {sizes.steps} steps"
        args.picture.write_text(picture(lines, title), encoding="utf-8")
    return {"sizes": dataclasses.asdict(sizes), "teacher": teacher, "arms": lines}


def results_file(out: Path, sizes: Sizes) -> Path:
    """Fresh and pretrained students share everything else of a folder."""
    if sizes.pretrain_steps:
        return out / f"results-pretrained-{sizes.pretrain_steps}-{sizes.tuning_rate:g}.jsonl"
    return out / "results.jsonl"


def read_results(file: Path) -> list[dict[str, Any]]:
    """Whole lines only: the last one of a run that was killed may not be."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def run_missing(out: Path, sizes: Sizes, names: list[str], seeds: int, processes: int) -> None:
    """Every (seed, arm) without a result, seed by seed, in spawned processes."""
    file = results_file(out, sizes)
    done = {(r["seed"], r["arm"]) for r in read_results(file)}
    jobs = [(seed, name) for seed in range(seeds) for name in names if (seed, name) not in done]
    context = multiprocessing.get_context("spawn")
    began = time.monotonic()
    with ProcessPoolExecutor(processes, mp_context=context) as pool, file.open("a") as sink:
        if sizes.pretrain_steps:
            list(pool.map(pretrain, [out] * seeds, [sizes] * seeds, range(seeds)))
        waiting: set[Future[dict[str, Any]]] = {
            pool.submit(train, out, sizes, name, seed) for seed, name in jobs
        }
        finished = 0
        while waiting:
            ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ready:
                result, finished = future.result(), finished + 1
                sink.write(json.dumps(result) + "\n")
                sink.flush()
                print(
                    f"{finished}/{len(jobs)} after {time.monotonic() - began:.0f} s: "
                    f"{result['arm']} seed {result['seed']} loss {result['loss']:.4f} "
                    f"KL {result['kl']:.4f} in {result['seconds']:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )


def environment() -> dict[str, Any]:
    """What a number means nothing without."""
    return {
        "command": " ".join(sys.argv),
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }


if __name__ == "__main__":
    main()
