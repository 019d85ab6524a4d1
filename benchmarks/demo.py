"""The whole way on a small book, offline, on a CPU: what `make demo` runs.

A tokenizer and a small teacher are trained on the spot with the tool itself (a cache of hard labels
and the hard loss). The teacher is cached by a run that is killed half-way and run again; one
student learns from the cache, the same student from the text alone, and both are compared. Every
command is printed as it is run.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "benchmarks" / "data" / "jane-eyre.txt"
BIN = Path(sys.executable).parent
VOCABULARY = 1024
LENGTH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    out = parser.parse_args().out
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "NO_COLOR": "1"}
    started = time.monotonic()

    say("A tokenizer and two model configurations")
    make_tokenizer(out / "tokenizer")
    make_configs(out)

    corpus = f"--corpus {BOOK} --sample-by paragraph --max-length {LENGTH}"
    train, held_out = "--split train[:92%]", "--split train[92%:]"
    say("A small teacher: a cache of hard labels, and the hard loss")
    labels = f"cache-teacher run --targets none --tokenizer {out}/tokenizer {corpus}"
    run(f"{labels} {train} --out {out}/labels")
    run(f"{labels} {held_out} --out {out}/labels-held-out")
    run(
        f"train-student run --student {out}/teacher-config --cache {out}/labels --out "
        f"{out}/teacher --validation-cache {out}/labels-held-out --soft-weight 0 --hard-weight 1 "
        "--max-steps 700 --batch-tokens 2048 --learning-rate 4e-3 --eval-every 100 "
        "--weight-decay 0.1 --set adam_beta2=0.98"
    )

    say("What would it cost?")
    capture = f"cache-teacher run --teacher {out}/teacher {corpus}"
    run(f"cache-teacher plan --teacher {out}/teacher {corpus} {train} --out {out}/cache")

    say("The teacher runs once; it is killed half-way and run again")
    killed_after = run_and_kill(f"{capture} {train} --out {out}/cache", out / "cache")
    run(f"{capture} {train} --out {out}/cache")
    run(f"{capture} {train} --out {out}/undisturbed")
    same = tree_hash(out / "cache") == tree_hash(out / "undisturbed")
    run(f"cache-teacher verify {out}/cache")
    run(f"cache-teacher inspect {out}/cache --rows 1")
    run(f"{capture} {held_out} --out {out}/held-out")

    say("Two students: one from the cache, the same one from the text alone")
    student = (
        f"train-student run --student {out}/student-config --cache {out}/cache "
        f"--validation-cache {out}/held-out --max-steps 450 --batch-tokens 2048 "
        "--learning-rate 3e-3 --set adam_beta2=0.98"
    )
    run(f"{student} --soft-weight 0 --hard-weight 1 --out {out}/text-alone")
    run(f"{student} --out {out}/distilled")

    say("Side by side")
    runs = f"{out}/text-alone {out}/distilled"
    run(f"train-student compare {runs} --html {out}/compare.html")
    summary(out, same, killed_after, time.monotonic() - started)


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def run(command: str) -> str:
    """Prints and runs one command; its standard output is shown and returned."""
    print(f"\n$ {command}", flush=True)
    program, *arguments = shlex.split(command)
    done = subprocess.run([str(BIN / program), *arguments], stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode != 0:
        sys.exit(f"the command above failed with exit code {done.returncode}")
    return done.stdout


def run_and_kill(command: str, cache: Path) -> int:
    """Starts a capture and kills it with -9 when half of its shards are committed."""
    print(f"\n$ {command}   # killed half-way", flush=True)
    program, *arguments = shlex.split(command)
    process = subprocess.Popen([str(BIN / program), *arguments])
    while process.poll() is None:
        committed = len(list((cache / "commits").glob("*.json")))
        if (cache / "manifest.json").is_file():
            plan = json.loads((cache / "manifest.json").read_text())["plan"]
            if committed >= plan["num_shards"] // 2:
                process.send_signal(signal.SIGKILL)
                process.wait()
                print(f"kill -9 after {committed} of {plan['num_shards']} shards", flush=True)
                return committed
        time.sleep(0.02)
    sys.exit("the capture ended before it could be killed")


def tree_hash(cache: Path) -> str:
    """sha256 over names and bytes of every file of a cache but `runs/`."""
    digest = hashlib.sha256()
    for path in sorted(cache.rglob("*")):
        name = path.relative_to(cache)
        if path.is_file() and name.parts[0] != "runs" and not path.name.startswith(".tmp."):
            digest.update(str(name).encode() + path.read_bytes())
    return digest.hexdigest()


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(BOOK)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)


def make_configs(out: Path) -> None:
    from transformers import LlamaConfig

    for name, width, layers in (("teacher", 160, 3), ("student", 64, 2)):
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=width * 3,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            attention_dropout=0.0,
        ).save_pretrained(out / f"{name}-config")


def summary(out: Path, same: bool, killed_after: int, seconds: float) -> None:
    """The table at the end; it prints what came out, whichever student is ahead."""
    runs = f"{out}/text-alone {out}/distilled"
    compared = json.loads(quiet(f"train-student compare {runs} --json"))
    cache = json.loads(quiet(f"cache-teacher inspect {out}/cache --rows 0 --json"))
    teacher, text, distilled = compared["models"]
    teacher["seconds"] = json.loads((out / "teacher" / "result.json").read_text())["seconds"]
    teacher["name"], text["name"] = "teacher", "student, text alone"
    distilled["name"] = "student, distilled"
    say("Result")
    header = ("", "parameters", "held-out loss", "KL", "agreement", "seconds")
    print("{:<20}{:>12}{:>15}{:>9}{:>11}{:>9}".format(*header))
    for model in (teacher, text, distilled):
        print(
            f"{model['name']:<20}{model['parameters']:>12,}{model['loss']:>15.4f}{model['kl']:>9.4f}"
            f"{model['agreement']:>11.1%}{model['seconds']:>9.1f}"
        )
    ahead = distilled["loss"] < text["loss"] and distilled["agreement"] > text["agreement"]
    verdict = "ahead of" if ahead else "NOT ahead of"
    print(f"\nthe distilled student is {verdict} the same student on text alone")
    print(f"bytes per token: {cache['bytes'] / cache['tokens']:.1f} (all columns)")
    entries = cache["entries"] or cache["targets"]["top_k"]
    print(
        f"targets: {cache['targets']['kind']}, {entries:.1f} entries of a position, "
        f"{cache['kept_mass']['1']:.1%} of the mass as it is"
    )
    print(f"killed after {killed_after} of {cache['num_shards']} shards")
    print(f"resumed cache = undisturbed cache: {'yes' if same else 'NO'}")
    print(f"picture: {(out / 'compare.html').resolve()}")
    print(f"everything took {seconds:.0f} s")
    if not same:
        sys.exit(1)


def quiet(command: str) -> str:
    program, *arguments = shlex.split(command)
    return subprocess.run(
        [str(BIN / program), *arguments], stdout=subprocess.PIPE, text=True, check=True
    ).stdout


if __name__ == "__main__":
    main()
