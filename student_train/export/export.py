"""`train-student export`: a folder ready to serve, and what its artefacts are worth.

    OUT/config.json, generation_config.json, the tokenizer
    OUT/model.safetensors       plain transformers: adapters merged, saved heads in place
    OUT/onnx/model.onnx         float32
    OUT/onnx/model_int8.onnx    int8, for CPUs
    OUT/README.md               the model card
    OUT/export.json             how each artefact compares with the student

Every artefact is read back from its file and held against the student as it was trained, adapters
unmerged. The folder appears whole or not at all.
"""

import copy
import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.cache import Cache, open_cache
from shared.errors import CacheMismatch
from shared.models.tokenizer import content_hash
from shared.storage.folders import check_free, new_folder
from student_train.config import ExportConfig, ExportFormat
from student_train.export.check import (
    Check,
    check,
    padded,
    random_samples,
    samples_of,
)
from student_train.export.model_card import CARD, ExportedFile, Subject, model_card
from student_train.export.onnx_files import (
    OUTPUTS,
    PACKAGES,
    Runner,
    require_onnx,
    session_runner,
    torch_runner,
    write_int8,
    write_onnx,
)
from student_train.student.fit import check_fit
from student_train.student.saved import (
    Run,
    check_is_student,
    find_run,
    load_student,
    load_tokenizer,
    merged,
)
from student_train.tasks.base import HardLabels, StudentTask
from student_train.tasks.samples import Reading, Sample
from student_train.tasks.table import task_of, task_of_outputs
from student_train.tasks.vector_folder import copy_modules

log = logging.getLogger(__name__)

REPORT = "export.json"
ONNX, INT8 = "onnx/model.onnx", "onnx/model_int8.onnx"
_EXAMPLE_ROWS = 2  # a size of 1 would be taken for a constant


@dataclass(frozen=True, slots=True)
class CheckedRows:
    """What artefacts are checked on, and where it came from."""

    samples: list[Sample]
    text: str
    labels: HardLabels | None


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A student as it was trained, and what its artefacts are held against it with."""

    run: Run | None
    cache: Cache | None
    student: Any
    tokenizer: Any
    inputs: list[str]
    outputs: list[str]
    rows: CheckedRows
    pad_token: int

    @property
    def task(self) -> StudentTask:
        """That of the cache; without one, what the student's own config says of its outputs."""
        if self.cache is None:
            return task_of_outputs(self.student.config)
        return task_of(self.cache.manifest)

    def merged(self, folder: Path) -> Any:
        """Another copy of the model, plain: the student keeps its adapters."""
        model = merged(load_student(folder, self.run, _labels(self.cache)))
        self.task.mark_exported(model.config)
        return model

    def example(self) -> dict[str, Tensor]:
        """A batch of random tokens, to trace a model on."""
        samples = random_samples(_EXAMPLE_ROWS, _vocabulary(self.student), self.inputs)
        return padded(samples, self.pad_token)


def run(config: ExportConfig) -> dict[str, Any]:
    """Exports a student; returns what `export.json` holds."""
    check_free(config.out)
    check_is_student(config.student)
    if {"onnx", "int8"} & set(config.format):
        require_onnx()
    loaded = _load(config)
    model = loaded.merged(config.student)
    with new_folder(config.out) as folder:
        model.config.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        copy_modules(config.student, folder)
        runners = _write(model, config, loaded.example(), loaded.outputs, folder)
        checks = _checks(loaded, model, runners)
        subject = Subject(
            name=config.out.name,
            architecture=type(model).__name__,
            model_type=model.config.model_type,
            parameters=sum(p.numel() for p in model.parameters()),
            encoder_decoder=bool(model.config.is_encoder_decoder),
            outputs=tuple(loaded.outputs),
            checked_on=loaded.rows.text,
            files=tuple(_exported(name, config, folder, checks[name]) for name in runners),
        )
        cache = loaded.cache
        card = model_card(subject, loaded.run, None if cache is None else cache.manifest)
        (folder / CARD).write_text(card, encoding="utf-8")
        numbers = _numbers(subject, cache, loaded.run.cache_ids if loaded.run else ())
        (folder / REPORT).write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    return numbers


def _load(config: ExportConfig) -> _Loaded:
    run_of = find_run(config.student)
    cache = open_cache(config.cache, allow_partial=True) if config.cache is not None else None
    if cache is None and run_of is not None:
        cache = run_of.open_cache()
    student = load_student(config.student, run_of, _labels(cache))
    tokenizer = load_tokenizer(config.student, run_of, cache)
    inputs = input_names(student, tokenizer)
    tokenizer.model_input_names = [name for name in inputs if name != "decoder_input_ids"]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # else it is not saved
    rows = _rows(config, student, cache, inputs, tokenizer, run_of)
    pad_token = _pad_token(student, tokenizer)
    outputs = _outputs(student, padded(rows.samples[:1], pad_token))
    return _Loaded(run_of, cache, student, tokenizer, inputs, outputs, rows, pad_token)


def _labels(cache: Cache | None) -> tuple[str, ...]:
    return () if cache is None else cache.manifest.labels


def _checks(
    loaded: _Loaded, model: Any, runners: Mapping[ExportFormat, Runner]
) -> dict[ExportFormat, Check]:
    """Each artefact against the student; `model` is the student with its adapters merged."""
    reference = torch_runner(loaded.student, loaded.outputs)
    return {
        name: check(
            reference,
            runner,
            loaded.rows.samples,
            clock=torch_runner(model, loaded.outputs),
            classes=_vocabulary(loaded.student),
            pad_token=loaded.pad_token,
            labels=loaded.rows.labels,
            task=loaded.task,
        )
        for name, runner in runners.items()
    }


def input_names(student: Any, tokenizer: Any) -> list[str]:
    """The inputs a user has: what the tokenizer gives and the model reads.

    A kind of each token only where there is more than one kind to tell apart.
    """
    taken = inspect.signature(_plain(student).forward).parameters
    kinds = getattr(student.config, "type_vocab_size", None)
    many_kinds = "token_type_ids" in tokenizer.model_input_names if kinds is None else kinds > 1
    names = ["input_ids", "attention_mask"]
    if "token_type_ids" in taken and many_kinds:
        names.append("token_type_ids")
    if student.config.is_encoder_decoder:
        names.append("decoder_input_ids")
    return names


def _plain(student: Any) -> Any:
    """The model below adapters, whose signature says what it takes."""
    return student.get_base_model() if hasattr(student, "peft_config") else student


def _outputs(student: Any, inputs: Mapping[str, Tensor]) -> list[str]:
    with torch.inference_mode():
        output = student(**inputs)
    return [name for name in OUTPUTS if name in output]


def _rows(
    config: ExportConfig,
    student: Any,
    cache: Cache | None,
    inputs: Sequence[str],
    tokenizer: Any,
    run_of: Run | None,
) -> CheckedRows:
    if cache is None or cache.num_rows == 0:
        log.warning(
            "%s: no cache to check the export on, random tokens are used: name a held-out one with "
            "--cache",
            config.student,
        )
        samples = random_samples(min(config.rows, 16), _vocabulary(student), inputs)
        return CheckedRows(samples, f"{len(samples)} rows of random tokens", None)
    found, cached = content_hash(tokenizer), cache.manifest.tokenizer.hash
    if found != cached:
        raise CacheMismatch(
            f"{cache.path}: its rows are of another tokenizer (content hash {cached[:12]}) than "
            f"that of {config.student} ({found[:12]}). Name a cache of this student's tokenizer."
        )
    check_fit(str(config.student), student.config, cache)
    start_token = getattr(student.config, "decoder_start_token_id", None) or 0
    samples = samples_of(cache, config.rows, Reading(inputs, start_token))
    count = len({sample.row for sample in samples})
    text = f"{count} rows of {_which(cache, run_of)} {cache.cache_id[:12]}"
    return CheckedRows(
        samples, text, task_of(cache.manifest).hard_labels(cache.manifest, student.config)
    )


def _which(cache: Cache, run_of: Run | None) -> str:
    trained_on = run_of is not None and cache.cache_id in run_of.cache_ids
    return "a cache that the student was trained on," if trained_on else "the held-out cache"


def _write(
    model: Any,
    config: ExportConfig,
    example: Mapping[str, Tensor],
    outputs: Sequence[str],
    folder: Path,
) -> dict[ExportFormat, Runner]:
    """Writes the artefacts asked for; each as it runs when read back."""
    runners: dict[ExportFormat, Runner] = {}
    asked = set(config.format)
    if asked & {"onnx", "int8"}:
        write_onnx(model, example, outputs, folder / ONNX)
    if "int8" in asked:
        write_int8(model, folder / ONNX, folder / INT8)
        runners["int8"] = session_runner(folder / INT8)
    if "onnx" in asked:
        runners["onnx"] = session_runner(folder / ONNX)
    else:
        for path in folder.glob(f"{ONNX}*"):
            path.unlink()
    if "safetensors" in asked:
        dtype = getattr(torch, config.dtype)
        (model if model.dtype == dtype else copy.deepcopy(model).to(dtype)).save_pretrained(folder)
        saved = type(model).from_pretrained(folder, dtype="auto", use_safetensors=True).eval()
        runners["safetensors"] = torch_runner(saved, outputs)
    return {name: runners[name] for name in ("safetensors", "onnx", "int8") if name in runners}


def _exported(name: ExportFormat, config: ExportConfig, folder: Path, found: Check) -> ExportedFile:
    pattern = {"safetensors": "model*.safetensors", "onnx": f"{ONNX}*", "int8": f"{INT8}*"}[name]
    paths = sorted(folder.glob(pattern))
    number_type = config.dtype if name == "safetensors" else {"onnx": "float32"}.get(name, "int8")
    return ExportedFile(
        format=name,
        dtype=number_type,
        files=tuple(str(path.relative_to(folder)) for path in paths),
        bytes=sum(path.stat().st_size for path in paths),
        check=found,
    )


def _numbers(subject: Subject, cache: Cache | None, cache_ids: Sequence[str]) -> dict[str, Any]:
    packages = ("torch", "transformers", *(PACKAGES if _has_onnx(subject) else ()))
    return {
        **asdict(subject),
        "student_bytes": 4 * subject.parameters,
        "checked_cache_id": None if cache is None else cache.cache_id,
        "trained_on_cache_ids": list(cache_ids),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in packages},
    }


def _has_onnx(subject: Subject) -> bool:
    return any(each.format != "safetensors" for each in subject.files)


def _pad_token(student: Any, tokenizer: Any) -> int:
    """One that the model has an embedding for: a tokenizer's may have been added after it."""
    own = student.config.get_text_config().pad_token_id
    places = range(_vocabulary(student))
    known = [i for i in (own, tokenizer.pad_token_id) if i is not None and i in places]
    return known[0] if known else 0


def _vocabulary(student: Any) -> int:
    return int(student.get_input_embeddings().weight.shape[0])
