"""The list of small jobs of unchanged.py, and the child process that runs it.

    python -P benchmarks/unchanged_jobs.py CHECKOUT      (PYTHONPATH=CHECKOUT, in an empty folder)

A job is a command with its arguments. The child calls the entry points that the two console scripts
call, and nothing else of a checkout, so that modules may move between two of them. Paths are
relative, so that two children in two folders do the same: props are in ../props (unchanged_props),
caches in caches/, runs in runs/, models in models/, what was printed in printed/, and exit codes
and seconds in done.json.
"""

import importlib
import json
import logging
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = {"cache-teacher": "teacher_cache.cli", "train-student": "student_train.cli"}


@dataclass(frozen=True, slots=True)
class Job:
    """One command; `name` is also the folder of what it makes, below caches/, runs/ or models/."""

    name: str
    program: str
    arguments: tuple[str, ...]


def jobs() -> list[Job]:
    """All jobs, in an order in which each finds what it reads."""
    made = [*_captures(), *_again(), *_students()]
    assert len({job.name for job in made}) == len(made)
    return made


# ---- Stage one


TASKS: dict[str, str] = {  # what every cache of a teacher is asked for
    "llama": "--corpus ../props/text.txt --max-length 96 --shard-tokens 7000",
    "masked": "--task masked-lm --corpus ../props/text.txt --max-length 64 --shard-tokens 7000",
    "tags": "--task token-classification --corpus ../props/ner_en_wnut17.jsonl --max-length 64",
    "one": "--task sequence-classification --corpus ../props/one.jsonl --max-length 48",
    "several": "--task sequence-classification --corpus ../props/several.jsonl --max-length 48",
    "numbers": "--task sequence-classification --corpus ../props/numbers.jsonl --max-length 48",
    "questions": "--task question-answering --corpus ../props/questions.jsonl --max-length 64 "
    "--stride 12",
    "vectors": "--task feature-extraction --corpus ../props/text.txt --max-length 64 "
    "--shard-tokens 7000",
    "t5": "--task seq2seq-lm --corpus ../props/translate_en_zh_tatoeba.jsonl --columns source=en "
    "--columns target=zh --max-length 32 --max-target-length 24 --shard-tokens 1500",
    "bart": "--task seq2seq-lm --corpus ../props/summarise_en_scitldr.jsonl --columns "
    "target=title --max-length 96 --max-target-length 24 --shard-tokens 500",
}
_SMALL = "--corpus ../props/instruct_en_gsm8k.jsonl --limit-documents 8 --max-length 96"

CAPTURES: dict[str, tuple[str, str]] = {  # name -> teacher, and what to keep
    # kinds of targets, on text
    "topk-7": ("llama", "--top-k 8 --temperature 2 --temperature 0.5"),
    "topk-8": ("llama", "--top-k 8 --temperature 2 --value-bits 8 --split train[:40]"),
    "topk-16": ("llama", "--top-k 20 --temperature 2 --value-bits 16 --dtype bfloat16"),
    "adaptive-7": ("llama", "--targets adaptive --mean-entries 9"),
    "adaptive-8": (
        "llama",
        "--targets adaptive --mean-entries 9 --value-bits 8 --temperature 2 --split train[:40]",
    ),
    "adaptive-16": (
        "llama",
        "--targets adaptive --mean-entries 5 --value-bits 16 --split train[:40]",
    ),
    "sample-7": ("llama", "--mean-entries 9 --seed 3"),
    "sample-8": ("llama", "--targets sample --mean-entries 5 --value-bits 8 --split train[:40]"),
    "sample-16": ("llama", "--targets sample --mean-entries 5 --value-bits 16 --split train[:40]"),
    "dense": ("llama", "--targets dense --split train[:30]"),
    "dense-temperature": ("llama", "--targets dense --temperature 2 --split train[:20]"),
    "second-teacher": ("second-llama", "--top-k 8 --temperature 2 --temperature 0.5"),
    # hidden states
    "hidden-bf16": ("llama", "--top-k 4 --hidden-layers -1 --hidden-layers 0"),
    "hidden-fp8": (
        "llama",
        "--top-k 4 --hidden-layers -1 --hidden-layers 0 --hidden-codec fp8 --split train[:40]",
    ),
    "hidden-int8": (
        "llama",
        "--top-k 4 --hidden-layers -1 --hidden-layers 1 --hidden-codec int8 --split train[:40]",
    ),
    "hidden-every": ("llama", "--top-k 4 --hidden-layers -1 --hidden-every 3 --split train[:40]"),
    "hidden-every-int8": (
        "llama",
        "--mean-entries 4 --hidden-layers 0 --hidden-every 4 --hidden-codec int8 "
        "--split train[:40]",
    ),
    # rows of a causal language model
    "packed": ("llama", "--top-k 4 --pack --sample-by paragraph"),
    "packed-lines": ("llama", "--mean-entries 6 --pack --forward-tokens 500 --split train[:40]"),
    # other tasks
    "masked": ("masked", "--top-k 8 --mask-copies 3"),
    "masked-sample": (
        "masked",
        "--mean-entries 6 --mask-copies 2 --mask-share 0.3 --seed 5 --split train[:40]",
    ),
    "masked-dense": ("masked", "--targets dense --split train[:20] --hidden-layers -1"),
    "pairs": ("t5", "--top-k 8 --temperature 2"),
    "pairs-sample": ("t5", "--mean-entries 6 --hidden-layers -1"),
    "pairs-bart": ("bart", "--targets adaptive --mean-entries 6 --columns source=document"),
    "tags": ("tags", "--shard-tokens 500 --hidden-layers -1 --temperature 2"),
    "tags-unlabelled": ("tags", "--unlabelled"),
    "one": ("one", "--shard-tokens 400 --temperature 2"),
    "one-unlabelled": ("one", "--unlabelled"),
    "several": ("several", "--shard-tokens 400"),
    "numbers": ("numbers", "--shard-tokens 400"),
    "questions": ("questions", "--shard-tokens 1000"),
    "questions-topk": ("questions", "--top-k 5 --temperature 2"),
    "questions-adaptive": ("questions", "--targets adaptive --mean-entries 6"),
    "vectors-mean": ("vectors", ""),
    "vectors-cls": ("vectors", "--pooling cls --hidden-codec int8 --hidden-layers 0"),
    "vectors-last": ("vectors", "--pooling last --hidden-codec fp8 --hidden-layers -1"),
    "vectors-of-tokens": (
        "vectors",
        "--pooling none --hidden-layers 1 --hidden-every 2 --hidden-codec int8",
    ),
    "vectors-of-all-tokens": ("vectors", "--pooling none --split train[:30]"),
}

SPECIAL: dict[str, str] = {  # name -> all there is to say
    "messages": "--teacher ../props/teachers/chat --corpus ../props/dialogue_zh_crosswoz.jsonl "
    "--top-k 8 --max-length 192 --limit-documents 4",
    "messages-marked": "--teacher ../props/teachers/marked-chat --corpus "
    "../props/dialogue_zh_crosswoz.jsonl --mean-entries 6 --max-length 192 --limit-documents 4",
    "completions": "--teacher ../props/teachers/llama --corpus ../props/instruct_en_gsm8k.jsonl "
    "--top-k 8 --max-length 160",
    "completions-chat": f"--teacher ../props/teachers/chat {_SMALL} --top-k 8",
    "completions-drawn": f"--teacher ../props/teachers/llama {_SMALL} --generate --max-new-tokens "
    "12 --sample-temperature 0.7 --top-p 0.9 --top-k 8",
    "completions-beams": f"--teacher ../props/teachers/chat {_SMALL} --generate --max-new-tokens "
    "12 --num-beams 2 --mean-entries 6",
    "pairs-messages": "--task seq2seq-lm --teacher ../props/teachers/t5 --corpus "
    "../props/dialogue_zh_crosswoz.jsonl --top-k 8 --max-length 96 --max-target-length 48 "
    "--limit-documents 4",
    "pairs-drawn": "--task seq2seq-lm --teacher ../props/teachers/t5 --corpus "
    "../props/translate_en_zh_tatoeba.jsonl --columns source=en --max-length 32 --generate "
    "--max-new-tokens 8 --sample-temperature 1 --limit-documents 12 --top-k 8",
    "pairs-beams": "--task seq2seq-lm --teacher ../props/teachers/bart --corpus "
    "../props/summarise_en_scitldr.jsonl --columns source=document --columns target=title "
    "--max-length 96 --generate --num-beams 2 --max-new-tokens 8 --top-k 4",
    "tags-conll": "--task token-classification --teacher ../props/teachers/tags --corpus "
    "../props/tagged.conll --max-length 64",
    "words": "--task token-classification --teacher ../props/teachers/tags --corpus "
    "../props/words.jsonl --max-length 64",
    "texts": "--task sequence-classification --teacher ../props/teachers/several --corpus "
    "../props/no-labels.jsonl --max-length 48",
    "text-pairs": "--task sequence-classification --teacher ../props/teachers/one --corpus "
    "../props/pairs.jsonl --max-length 64",
    "second-like": "--teacher ../props/teachers/second-llama --corpus ../props/other.txt --top-k 4 "
    "--max-length 64 --split train[:50%]",
}


def _captures() -> Iterator[Job]:
    """A cache for every kind of target, every task, and every way of a corpus."""
    for name, (teacher, asked) in CAPTURES.items():
        task = TASKS["llama" if teacher == "second-llama" else teacher]
        yield _capture(name, f"--teacher ../props/teachers/{teacher} {task} {asked}")
    for name, arguments in SPECIAL.items():
        yield _capture(name, arguments)
    of_llama = "--tokenizer ../props/tokenizer"
    tokenizers = {"llama": of_llama, "t5": "--tokenizer ../props/teachers/t5"}
    for name in ("llama", "masked", "tags", "one", "several", "numbers", "questions", "t5"):
        tokenizer = tokenizers.get(name, "--tokenizer ../props/pieces")
        yield _capture(f"labels-{name}", f"{TASKS[name]} --targets none {tokenizer}")
    yield _capture("labels-packed", f"{TASKS['llama']} --targets none {of_llama} --pack")


def _again() -> Iterator[Job]:
    """Caches made out of caches or like them, a smaller model, and what is told of caches."""
    for name, cache, teacher, arguments in (
        ("like-topk", "topk-7", "llama", "--corpus ../props/other.txt"),
        ("like-sample", "sample-7", "llama", "--corpus ../props/other.txt"),
        ("like-hidden", "hidden-int8", "llama", "--corpus ../props/other.txt"),
        ("like-masked", "masked", "masked", "--task masked-lm --corpus ../props/other.txt"),
        (
            "like-tags",
            "tags",
            "tags",
            "--task token-classification --corpus ../props/words.jsonl --unlabelled",
        ),
        (
            "like-vectors",
            "vectors-cls",
            "vectors",
            "--task feature-extraction --corpus ../props/other.txt",
        ),
    ):
        like = f"--like caches/{cache} --teacher ../props/teachers/{teacher}"
        yield _capture(name, f"{like} {arguments}")
    for name, cache, arguments in (
        ("repack-topk", "topk-16", "--top-k 4 --value-bits 7 --documents 10:60"),
        ("repack-adaptive", "adaptive-16", "--mean-entries 3 --value-bits 8"),
        ("repack-sample", "sample-16", "--mean-entries 3 --value-bits 7"),
        ("repack-hidden", "hidden-bf16", "--hidden-layers -1 --documents :30"),
        ("repack-no-hidden", "hidden-int8", "--drop-hidden"),
        ("repack-labels", "tags", "--documents 3:20"),
    ):
        given = f"repack caches/{cache} caches/{name} {arguments}"
        yield Job(name, "cache-teacher", tuple(given.split()))
    fewer = "student --teacher ../props/teachers/llama --layers 1 --out models/fewer-blocks"
    yield Job("fewer-blocks", "cache-teacher", tuple(fewer.split()))
    sealed = "verify caches/repack-topk --seal --json"  # adds index.arrow to it
    yield Job("seal", "cache-teacher", tuple(sealed.split()))
    plan = f"plan --teacher ../props/teachers/llama {TASKS['llama']} --out caches/none --json"
    yield Job("plan", "cache-teacher", tuple(plan.split()))
    for cache in ("topk-7", "sample-7", "hidden-every", "masked", "pairs", "tags", "several"):
        told = f"inspect caches/{cache} --rows 3"
        yield Job(f"inspect-{cache}", "cache-teacher", tuple(told.split()))
    for cache in ("dense", "numbers", "questions", "vectors-mean"):
        told = f"inspect caches/{cache} --rows 2 --json"
        yield Job(f"inspect-{cache}", "cache-teacher", tuple(told.split()))
    for cache, teacher in (("topk-16", "llama"), ("tags", "tags"), ("hidden-int8", "llama")):
        arguments = f"check caches/{cache} --teacher ../props/teachers/{teacher} --device cpu"
        yield Job(f"check-{cache}", "cache-teacher", (*arguments.split(), "--rows", "8"))


def _capture(name: str, arguments: str) -> Job:
    given = f"run --out caches/{name} --device cpu {arguments}"
    return Job(name, "cache-teacher", tuple(given.split()))


# ---- Stage two


RUNS: dict[str, str] = {
    "text": "--student ../props/students/llama --cache caches/topk-7 --temperature 2 "
    "--validation-cache caches/like-topk --eval-every 2",
    "labels": "--student ../props/students/bert --cache caches/tags --temperature 2 "
    "--hidden-weight 0.3 --validation-cache caches/tags",
    "ensemble": "--student ../props/students/llama --ensemble --cache caches/topk-7=3 --cache "
    "caches/second-teacher=1",
    "sample": "--student ../props/students/llama --cache caches/sample-7",
    "dense": "--student ../props/students/llama --cache caches/dense --temperature 3 "
    "--soft-loss jsd",
    "adaptive": "--student ../props/students/llama --cache caches/adaptive-7 "
    "--soft-loss reverse-kl --lora-rank 4",
    "mixture": "--student ../props/students/llama --cache caches/topk-7=2 --cache "
    "caches/like-topk=1",
    "states": "--student ../props/students/llama --cache caches/hidden-every --hidden-weight 1",
    "masked": "--student ../props/students/bert --cache caches/masked",
    "pairs": "--student ../props/students/t5 --cache caches/pairs --validation-cache caches/pairs "
    "--generate-rows 4 --max-new-tokens 6",
    "one": "--student ../props/students/bert --cache caches/one --validation-cache caches/one",
    "several": "--student ../props/students/bert --cache caches/several",
    "numbers": "--student ../props/students/bert --cache caches/numbers",
    "questions": "--student ../props/students/bert --cache caches/questions --validation-cache "
    "caches/questions",
    "vectors": "--student ../props/students/bert --cache caches/vectors-mean --hidden-weight 1 "
    "--soft-weight 0 --hard-weight 0 --validation-cache caches/vectors-mean",
}
_TRAINING = (
    "--max-steps 4 --batch-tokens 600 --micro-batch-tokens 350 --learning-rate 3e-3 --log-every 2 "
    "--device cpu --dtype float32"
)


def _students() -> Iterator[Job]:
    """A student of each kind of cache and each task, and three evaluations."""
    for name, arguments in RUNS.items():
        given = f"run --out runs/{name} {_TRAINING} {arguments}"
        yield Job(f"run-{name}", "train-student", tuple(given.split()))
    for run, cache in (("text", "like-topk"), ("labels", "tags"), ("questions", "questions")):
        given = (
            f"evaluate --student runs/{run} --cache caches/{cache} --device cpu --json --worst 2"
        )
        yield Job(f"evaluate-{run}", "train-student", tuple(given.split()))


# ---- The child


def main() -> None:
    """Runs every job in this process, then asks every command for its --help."""
    checkout = Path(sys.argv[1]).resolve()
    entries = {program: _entry(module, checkout) for program, module in PROGRAMS.items()}
    for folder in ("caches", "runs", "models", "printed"):
        Path(folder).mkdir()
    done = {}
    for job in jobs():
        started = time.monotonic()
        code = _run(job, entries[job.program])
        done[job.name] = {"code": code, "seconds": round(time.monotonic() - started, 2)}
    Path("done.json").write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    for program, entry in entries.items():
        _run(Job(f"help-{program}", program, ("--help",)), entry)
        told = Path(f"printed/help-{program}.out").read_text(encoding="utf-8")
        listed = told.partition("─ Commands ─")[2].splitlines()[1:]
        for command in [line.split()[1] for line in listed if line.startswith("│")]:
            _run(Job(f"help-{program}-{command}", program, (command, "--help")), entry)


def _entry(module: str, checkout: Path) -> Callable[[], None]:
    """What a console script calls; it must be the checkout's own."""
    found = importlib.import_module(module)
    for package in (module.split(".")[0], "shared"):
        place = Path(str(importlib.import_module(package).__file__)).resolve()
        if checkout not in place.parents:
            raise SystemExit(f"{package} is imported from {place}, not from {checkout}")
    entry: Callable[[], None] = found.main
    return entry


def _run(job: Job, entry: Callable[[], None]) -> int:
    """The exit code; standard output and error go to files."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (so that no job hangs on what an earlier one drew)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.INFO)
    sys.argv = [job.program, *job.arguments]
    kept = os.dup(1), os.dup(2)
    for stream, end in ((1, "out"), (2, "err")):
        target = os.open(f"printed/{job.name}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(target, stream)
        os.close(target)
    try:
        entry()
        return 0
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except Exception:  # noqa: BLE001 (a job that fails is a result: it is told, the others run)
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, file in zip((1, 2), kept, strict=True):
            os.dup2(file, stream)
            os.close(file)


if __name__ == "__main__":
    main()
