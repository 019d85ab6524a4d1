"""The model card of an exported student: what it learnt, from whom, how good it is, how to load it.

Numbers come from the run's own result and from the checks of the export; nothing is said that is
not recorded, and no path of the machine it was made on.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from shared.format.manifest import Manifest
from student_train.config import ExportFormat, TrainConfig
from student_train.export.check import Check
from student_train.metrics.names import TITLES
from student_train.run_files import kind_of_text
from student_train.student.saved import Run
from student_train.tasks.base import Served
from student_train.tasks.table import served_as

CARD = "README.md"


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """One artefact: its files, their size, and how it compares with the student."""

    format: ExportFormat
    dtype: str
    files: tuple[str, ...]
    bytes: int
    check: Check


@dataclass(frozen=True, slots=True)
class Subject:
    """The exported model."""

    name: str
    architecture: str
    model_type: str
    parameters: int
    encoder_decoder: bool
    outputs: tuple[str, ...]
    checked_on: str
    files: tuple[ExportedFile, ...]


def model_card(subject: Subject, run: Run | None, manifest: Manifest | None) -> str:
    """Markdown behind YAML that the Hub reads."""
    sections = [
        _front_matter(subject, run),
        f"# {subject.name}",
        _summary(subject, run, manifest),
        "## How to load",
        *_loading(subject),
    ]
    if run is not None:
        sections += ["## Training", _rows(_training(run, manifest))]
        if "validation" in run.result:
            sections += ["## Held-out numbers", *_held_out(run.result)]
    sections += ["## The exported files", *_checks(subject)]
    return "\n\n".join(sections) + "\n"


def _served(subject: Subject) -> Served | None:
    """How it is found and called; None where its class does not say."""
    return served_as(subject.architecture, encoder_decoder=subject.encoder_decoder)


def _front_matter(subject: Subject, run: Run | None) -> str:
    formats = [each.format for each in subject.files]
    with_onnx = {"onnx", "int8"} & set(formats)
    values: dict[str, Any] = {
        "library_name": "transformers",
        "tags": ["distillation", "teacher-cache", *(["onnx"] if with_onnx else [])],
    }
    served = _served(subject)
    if served is not None:
        values["pipeline_tag"] = served.tag
    if run is not None and _on_hub(run.config.student):
        values["base_model"] = run.config.student
    return f"---\n{yaml.safe_dump(values, sort_keys=False).rstrip()}\n---"


def _on_hub(name: str) -> bool:
    """Whether a student came from the Hub: then its config lies in the Hub's local cache."""
    if Path(name).exists():
        return False
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def _summary(subject: Subject, run: Run | None, manifest: Manifest | None) -> str:
    text = f"A {subject.architecture} of {subject.parameters:,} parameters"
    teachers = _teachers(run, manifest)
    if not teachers:
        return f"{text}."
    return f"{text}, a student of {' and '.join(_teacher(each) for each in teachers)}."


def _teachers(run: Run | None, manifest: Manifest | None) -> list[Mapping[str, Any]]:
    if run is None:
        return []
    recorded = run.result.get("teachers")
    if recorded is not None:
        unique = {str(each): each for each in recorded if each is not None}
        return list(unique.values())
    teacher = None if manifest is None else manifest.teacher
    if teacher is None:
        return []
    return [{"id": teacher.id, "revision": teacher.revision, "parameters": teacher.parameters}]


def _teacher(teacher: Mapping[str, Any]) -> str:
    return f"`{teacher['id']}` ({teacher['parameters']:,} parameters)"


def _training(run: Run, manifest: Manifest | None) -> Iterator[tuple[str, str]]:
    config, result = run.config, run.result
    task = result.get("task") or (None if manifest is None else manifest.task)
    if task:
        yield "task", str(task)
    for teacher in _teachers(run, manifest):
        yield "teacher", f"{_teacher(teacher)}, revision `{teacher['revision']}`"
    targets = result.get("targets") or ([] if manifest is None else [manifest.targets.text])
    if targets:
        yield "targets", ", ".join(dict.fromkeys(targets))
    if run.cache_ids:
        yield "cache", ", ".join(f"`{cache_id}`" for cache_id in run.cache_ids)
    yield "student before", _student_before(config.student)
    yield "losses", "; ".join(_losses(config, of_numbers=_are_numbers(targets)))
    if "steps" in result:
        yield "steps", f"{result['steps']:,} of {config.batch_tokens:,} tokens"
    yield "learning rate", f"{config.learning_rate:g}, {config.scheduler}"
    if config.lora_rank:
        yield "adapters", f"LoRA of rank {config.lora_rank}, merged"
    yield "seed", str(config.seed)


def _student_before(name: str) -> str:
    return f"`{name}`" if _on_hub(name) else f"a local folder, `{Path(name).name}`"


def _are_numbers(targets: Sequence[str]) -> bool:
    """Whether teachers said numbers."""
    kinds = [kind_of_text(text) for text in targets]
    return any(kind is not None and kind.numbers for kind in kinds)


def _losses(config: TrainConfig, *, of_numbers: bool) -> Iterator[str]:
    ends = config.scheduled
    scheduled = {name: f" to {end:g}" for name, (_, end) in ends.items()}
    if config.uses_soft_loss and of_numbers:
        soft_weight = f"{config.soft_weight:g}{scheduled.get('soft_weight', '')}"
        yield f"{soft_weight} x squared error to the teacher's numbers"
    elif config.uses_soft_loss:
        yield (
            f"{config.soft_weight:g}{scheduled.get('soft_weight', '')} x {config.soft_loss} at "
            f"temperature {config.temperature:g}{scheduled.get('temperature', '')}"
        )
    if config.hard_weight or "hard_weight" in scheduled:
        yield f"{config.hard_weight:g}{scheduled.get('hard_weight', '')} x hard labels"
    if config.uses_hidden_loss:
        yield (
            f"{config.hidden_weight:g}{scheduled.get('hidden_weight', '')} x hidden states, "
            f"{config.hidden_loss}"
        )


def _held_out(result: Mapping[str, Any]) -> Iterator[str]:
    numbers = result["validation"]
    metric = numbers.get("metric")
    loss = "mean squared error" if metric == "pearson" else "loss, nats"
    lines = [(loss, numbers.get("teacher_loss"), numbers.get("loss"))]
    if metric is not None:
        lines.append((TITLES[metric], numbers.get(f"teacher_{metric}"), numbers.get(metric)))
    lines += [
        ("KL to the teacher, nats", None, numbers.get("kl", numbers.get("kl_bucketed"))),
        ("same most probable class as the teacher", None, numbers.get("agreement")),
    ]
    shown = [(name, _number(t), _number(s)) for name, t, s in lines if s is not None]
    yield _table(("", "teacher", "student"), shown)
    yield (
        f"Over {numbers['positions']:,} positions of the held-out cache "
        f"`{result['validation_cache_id']}`."
    )


def _checks(subject: Subject) -> Iterator[str]:
    header = ["", "number type", "bytes", "largest difference", "mean", "argmax equal", "time"]
    with_loss = any(each.check.artefact.loss is not None for each in subject.files)
    metric = next((each.check.artefact.metric for each in subject.files), None)
    header += ["loss (student)"] if with_loss else []
    header += [f"{TITLES[metric]} (student)"] if metric else []
    rows = []
    for each in subject.files:
        found = each.check
        row = [
            ", ".join(f"`{name}`" for name in each.files),
            each.dtype,
            f"{each.bytes:,}",
            f"{found.max_difference:.1e}",
            f"{found.mean_difference:.1e}",
            "" if found.agreement is None else f"{found.agreement:.2%}",
            f"{found.time_ratio:.2f} x",
        ]
        pairs = [(found.artefact.loss, found.student.loss)] if with_loss else []
        pairs += [(found.artefact.value, found.student.value)] if metric else []
        rows.append([*row, *(f"{_number(a)} ({_number(s)})" for a, s in pairs)])
    yield _table(header, rows)
    yield (
        f"Differences of logits from the float32 student, on {subject.checked_on}; the time of one "
        "row, as a multiple of what float32 takes in torch on the same threads of a CPU."
    )


def _loading(subject: Subject) -> Iterator[str]:
    formats = {each.format: each for each in subject.files}
    if "safetensors" in formats:
        yield _python(_with_transformers(subject))
    files = [formats[name].files[0] for name in ("int8", "onnx") if name in formats]
    if files:
        yield "On a CPU, with `pip install onnxruntime transformers`:"
        yield _python(_with_onnx(subject, files[0]))
    if len(files) > 1:
        yield f"`{files[1]}` is loaded in the same way; its weights are float32."
    if files and _generates(subject):
        yield (
            "The ONNX file gives the logits of whole sequences; keys and values are not kept from "
            "one call to the next, so generating with it costs more with every token."
        )


def _with_transformers(subject: Subject) -> list[str]:
    served, name = _served(subject), subject.name
    if served is None or served.example is None:
        return [
            f"from transformers import AutoTokenizer, {subject.architecture}",
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
            f'model = {subject.architecture}.from_pretrained("{name}")',
        ]
    return [
        "from transformers import pipeline",
        "",
        f'task = pipeline("{served.tag}", model="{name}")',
        f"print(task({served.example}))",
    ]


def _with_onnx(subject: Subject, path: str) -> list[str]:
    names = ", ".join(subject.outputs)
    lines = [
        "import onnxruntime",
        "from transformers import AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{subject.name}")',
        f'session = onnxruntime.InferenceSession("{subject.name}/{path}")',
    ]
    call = 'dict(tokenizer("some text", return_tensors="np"))'
    if subject.encoder_decoder:
        lines.append("output = np.array([[start_token]])  # and the tokens so far")
        call = call.replace('np")', 'np"), decoder_input_ids=output')
        lines.insert(0, "import numpy as np")
    return [*lines, f"{names}, *_ = session.run(None, {call})"]


def _generates(subject: Subject) -> bool:
    served = _served(subject)
    return served is not None and served.writes


def _python(lines: Sequence[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _rows(pairs: Iterator[tuple[str, str]]) -> str:
    return _table(("", ""), list(pairs))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
