"""The teacher: loaded once, then logits and hidden states for one batch after another.

Hidden states are named by layer: n is what block n hands on (counted from 0), -1 the final state
after the last norm, which is what the head reads. So the last block's own output, before the norm,
is layer `num_layers - 1`, not -1.

B rows, T tokens, N positions (flat in B * T), n positions of one chunk, V logit width, D hidden.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from shared.errors import ConfigError, Refused
from shared.models.limits import most_tokens
from shared.models.pooling import pooled
from shared.tasks import TASKS, Layout, Pooling, ProblemType, TaskName
from shared.windows import context_bounds, window_logits
from teacher_cache.engines import probes, streamed_head
from teacher_cache.engines.streamed_head import (
    StreamedHead,
    TeacherBatch,
    last_state,
    model_inputs,
    same_values,
)

__all__ = [
    "Teacher",
    "TeacherBatch",
    "TeacherOutput",
    "config_hash",
    "digest_of",
    "hidden_width_of",
    "load_tokenizer",
    "logit_width_of",
    "problem_type_of",
    "weights_digest",
]

log = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
FINAL = -1  # the layer after the last norm
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}  # of logits, counted as float32
CHUNK_MULTIPLE = 16  # matrix products like whole tiles
# What a config says of how it was loaded, not of the model.
UNHASHED = {"transformers_version", "_name_or_path", "dtype", "use_cache", "return_dict"}


# As a config of `transformers` names them.
PROBLEM_TYPES: dict[str, ProblemType] = {
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
    "regression": "regression",
}

LogitsOf = Callable[[Tensor], Tensor]  # flat positions [n] -> logits [n, V]


@dataclass(slots=True)
class TeacherOutput:
    """Of one batch: all hidden states, and logits that are computed as the chunks are asked for."""

    hidden: dict[int, Tensor]  # layer -> [N, D] in the teacher's dtype, on that layer's device
    chunks: Iterator[tuple[slice, Tensor]]  # places in `position_index`, their logits [n, V]


@dataclass(slots=True)
class Teacher:
    """A model in evaluation mode, without a cache and without gradients.

    A language model, causal or masked, an encoder-decoder, whose layers are those of its decoder,
    or a model with a head over labels, whose logits are its own: they are few. Or a model without a
    head, of which hidden states are wanted.
    """

    model: Any  # PreTrainedModel
    tokenizer: Any  # PreTrainedTokenizerBase
    num_classes: int  # C, the smaller of V and the highest token id + 1
    logit_width: int  # V
    trunk: nn.Module | None  # ends in the final hidden state; None: not found
    blocks: nn.ModuleList
    streamed: StreamedHead | None  # None: full logits, since streamed ones differed
    labels: tuple[str, ...] = ()  # names of the classes of a label space
    # row: logits are [B, L], see `problem_type`; window: see windows.py; pair: positions are the
    # decoder's
    layout: Layout = "tokens"
    problem_type: ProblemType = "single_label"
    has_logits: bool = True

    @classmethod
    def load(
        cls,
        teacher: str,
        *,
        task: TaskName = "causal-lm",
        problem_type: ProblemType = "single_label",
        max_length: int = 0,
        tokenizer: str | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
    ) -> "Teacher":
        """From a folder or a Hub id. `device` is auto, a torch device, or balanced: all GPUs.

        `tokenizer` names another folder or id; None: the teacher's own, in the same revision.
        `max_length`: the tokens of the longest row, where these are the classes.
        """
        if dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype}: expected one of {', '.join(DTYPES)}.")
        placement = _placement(device)
        source = model_source(teacher)
        loaded_tokenizer = load_tokenizer(
            tokenizer or teacher,
            revision=None if tokenizer else revision,
            trust_remote_code=trust_remote_code,
        )
        try:
            auto_class = getattr(transformers, TASKS[task].auto_class)
            model, report = auto_class.from_pretrained(
                source,
                revision=revision,
                trust_remote_code=trust_remote_code,
                dtype=dtype,
                device_map=placement,
                attn_implementation=attn_implementation,
                output_loading_info=True,
            )
        except (OSError, ValueError, ImportError) as error:
            raise Refused(f"{teacher}: cannot be loaded for {task}. {error}") from error
        missing = sorted(map(str, {*report["missing_keys"], *report["mismatched_keys"]}))
        of_states = TASKS[task].target_space == "states"
        if of_states and missing and all(name.startswith("pooler.") for name in missing):
            model.pooler, missing = None, []  # saved with another head, and read by nothing here
        if missing:
            raise Refused(
                f"{teacher}: the checkpoint lacks {len(missing)} weights of {type(model).__name__} "
                f"({', '.join(missing[:3])}), which would stay random. "
                f"Name a checkpoint that was saved with its head for {task}."
            )
        if of_states:
            return cls.wrap_states(model, loaded_tokenizer)
        if TASKS[task].target_space == "labels":
            return cls.wrap_labels(model, loaded_tokenizer, task, problem_type)
        if TASKS[task].target_space == "tokens":
            return cls.wrap_windows(model, loaded_tokenizer, max_length)
        return cls.wrap(model, loaded_tokenizer, task)

    @classmethod
    def wrap_labels(
        cls,
        model: Any,
        tokenizer: Any,
        task: TaskName,
        problem_type: ProblemType = "single_label",
    ) -> "Teacher":
        """A model with a head over labels that is already in memory."""
        model.eval().requires_grad_(False)
        model.config.return_dict = True
        if model.config.pad_token_id is None:  # causal trunks look for the last token by it
            model.config.pad_token_id = tokenizer.pad_token_id
        names = model.config.id2label
        count = int(model.config.num_labels)
        classes = {"single_label": count, "multi_label": 2, "regression": 1}[problem_type]
        return cls(
            model=model,
            tokenizer=tokenizer,
            num_classes=classes,
            logit_width=classes,
            trunk=model.base_model if TASKS[task].layout == "tokens" else None,
            blocks=_find_blocks(model),
            streamed=None,
            labels=tuple(str(names[number]) for number in range(count)),
            layout=TASKS[task].layout,
            problem_type=problem_type,
        )

    @classmethod
    def wrap_states(cls, model: Any, tokenizer: Any) -> "Teacher":
        """A model without a head that is already in memory: its states are wanted."""
        model.eval().requires_grad_(False)
        model.config.return_dict = True
        return cls(
            model=model,
            tokenizer=tokenizer,
            num_classes=max(tokenizer.get_vocab().values()) + 1,
            logit_width=1,
            trunk=model,
            blocks=_find_blocks(model),
            streamed=None,
            has_logits=False,
        )

    @classmethod
    def wrap_windows(cls, model: Any, tokenizer: Any, max_length: int) -> "Teacher":
        """A model for question answering that is already in memory; its classes are the tokens."""
        model.eval().requires_grad_(False)
        model.config.return_dict = True
        places = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if places is not None and max_length > places:
            raise Refused(
                f"--max-length {max_length}: {type(model).__name__} takes {places:,} positions. "
                f"Use at most --max-length {places}: longer texts are cut into windows."
            )
        return cls(
            model=model,
            tokenizer=tokenizer,
            num_classes=max_length,
            logit_width=max_length,
            trunk=None,
            blocks=_find_blocks(model),
            streamed=None,
            layout="window",
        )

    @classmethod
    def wrap(cls, model: Any, tokenizer: Any, task: TaskName = "causal-lm") -> "Teacher":
        """A language model already in memory, which is put into evaluation mode and probed."""
        layout = TASKS[task].layout
        model.eval().requires_grad_(False)
        model.config.return_dict = True
        num_ids = max(tokenizer.get_vocab().values()) + 1
        embedded_ids = model.get_input_embeddings().weight.shape[0]
        batch = probes.padded_batch(min(num_ids, embedded_ids), layout).to(model.device)
        inputs = model_inputs(model, batch)
        with torch.no_grad():
            found = streamed_head.find(model, inputs)
            streams = found is not None and streamed_head.agrees(
                found, inputs, batch.position_index
            )
            logit_width = model(**inputs).logits.shape[-1]
        if not streams:
            log.warning(
                "%s: logits of some positions alone differ from the model's own, so all logits of "
                "a batch will be computed at once, which takes much more memory",
                type(model).__name__,
            )
        trunk = None if found is None else found.trunk
        teacher = cls(
            model=model,
            tokenizer=tokenizer,
            num_classes=min(logit_width, num_ids),
            logit_width=logit_width,
            trunk=trunk,
            blocks=_find_blocks(model.get_decoder() if layout == "pair" else trunk or model),
            streamed=found if streams else None,
            layout=layout,
        )
        probed = teacher.logits, teacher.num_classes
        if task == "masked-lm" and probes.ignores_later_tokens(*probed):
            raise Refused(
                f"{type(model).__name__}: its prediction of a token does not depend on later "
                "tokens, so it is no masked language model. Name an encoder (a BERT: saved "
                "without is_decoder), or use --task causal-lm."
            )
        if task != "masked-lm" and probes.sees_later_tokens(*probed, layout):
            raise Refused(
                f"{type(model).__name__}: its prediction of a token depends on later tokens, so it "
                "is no causal language model. Name a decoder (a BERT: saved with is_decoder)."
            )
        return teacher

    @property
    def device(self) -> torch.device:
        """Where batches go; with several devices, that of the embedding."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def hidden_width(self) -> int:
        """D of every layer that `check_layers` lets pass."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def attn_implementation(self) -> str | None:
        return self.model.config._attn_implementation

    @property
    def revision(self) -> str | None:
        """The commit a Hub id was resolved to; None for a folder."""
        return getattr(self.model.config, "_commit_hash", None)

    @property
    def chunk_positions(self) -> int:
        """Positions whose logits exist at once; part of the plan, for it changes the rounding."""
        budget = CHUNK_BYTES.get(self.device.type, CHUNK_BYTES["cpu"])
        tiles = budget // (4 * self.logit_width * CHUNK_MULTIPLE)
        return max(1, tiles) * CHUNK_MULTIPLE

    def forward(
        self,
        batch: TeacherBatch,
        layers: Sequence[int] = (),
        *,
        chunk_positions: int | None = None,
        pooling: Pooling = "none",
    ) -> TeacherOutput:
        """One forward of the trunk now; the head runs as the caller takes the chunks.

        With `pooling` each row has one position, whose state is made of those of all its tokens.
        """
        batch = batch.to(self.device)
        hidden: dict[int, Tensor] = {}
        with torch.no_grad(), ExitStack() as hooks:
            for layer in layers:
                hooks.enter_context(self._keeping(layer, batch, pooling, hidden))
            if not self.has_logits:
                self.model(**model_inputs(self.model, batch))
                return TeacherOutput(hidden, iter(()))
            logits_of = self._run(batch)
        chunk = chunk_positions or self.chunk_positions
        return TeacherOutput(hidden, _chunks(logits_of, batch.position_index, chunk))

    def logits(self, batch: TeacherBatch) -> Tensor:
        """[N, V] at once, for probes and checks."""
        return torch.cat([logits_nV for _, logits_nV in self.forward(batch).chunks])

    def allows_packing(self) -> bool:
        """Whether packed rows give what their documents give alone, found by trying it."""
        return streamed_head.accepts(self.model, "position_ids") and probes.packed_equals_alone(
            self.logits, self.num_classes
        )

    def check_length(self, max_length: int) -> None:
        """Refuses rows that are longer than the model's table of positions."""
        most = most_tokens(self.model)
        if most is not None and max_length > most:
            raise Refused(
                f"--max-length {max_length}: {type(self.model).__name__} takes rows of at most "
                f"{most} tokens. Use --max-length {most}: longer texts are cut into several rows."
            )

    def check_layers(self, layers: Sequence[int]) -> None:
        """Refuses a layer that does not exist, is of another width, or is reported otherwise."""
        batch = probes.padded_batch(self.num_classes, self.layout).to(self.device)
        hidden = self.forward(batch, layers).hidden
        with torch.no_grad():
            inputs = model_inputs(self.model, batch)
            output = self.model(**inputs, output_hidden_states=True)
        of_pairs = self.layout == "pair"
        reported = output.decoder_hidden_states if of_pairs else output.hidden_states

        def at_positions(state_BTD: Tensor) -> Tensor:
            return state_BTD.flatten(0, 1)[batch.position_index.to(state_BTD.device)]

        for layer, states_ND in hidden.items():
            if states_ND.shape[1] != self.hidden_width:
                raise Refused(
                    f"hidden_layers={layer}: {states_ND.shape[1]} channels, where "
                    f"{type(self.model).__name__} has {self.hidden_width}. Leave this layer out."
                )
            if layer == self.num_layers - 1:
                continue  # the model reports it after the norm only, which is layer -1
            if not states_ND.any() or not any(
                same_values(states_ND, at_positions(state_BTD), probes.SAME_SHAPE[self.dtype])
                for state_BTD in reported  # Mamba's list begins after block 0, others before it
            ):
                raise Refused(
                    f"hidden_layers={layer}: what {type(self.model).__name__} hands on there is "
                    "none of the hidden states it reports. Leave this layer out."
                )

    def _run(self, batch: TeacherBatch) -> LogitsOf:
        """Runs the trunk, or all of the model, and returns how to get logits at flat positions."""
        inputs, streamed = model_inputs(self.model, batch), self.streamed
        if self.layout == "window":
            return self._run_windows(inputs, batch)
        if self.layout == "row":
            logits_BL, width = self.model(**inputs).logits, inputs["input_ids"].shape[1]
            return _of_rows(logits_BL, width, self.problem_type)
        if streamed is None:
            full_MV = self.model(**inputs).logits.flatten(0, 1)
            return lambda index_n: full_MV[index_n]
        outputs = streamed.run_trunk(inputs)
        states_MD = last_state(outputs[-1]).flatten(0, 1)
        return lambda index_n: streamed.logits(
            inputs, outputs, states_MD[index_n.to(states_MD.device)]
        )

    def _run_windows(self, inputs: dict[str, Any], batch: TeacherBatch) -> LogitsOf:
        assert batch.segments is not None  # rows of this layout have several parts
        output, context_B2 = self.model(**inputs), context_bounds(batch.segments)
        logits = output.start_logits, output.end_logits
        return lambda index_n: window_logits(*logits, context_B2, index_n, self.num_classes)

    @contextmanager
    def _keeping(
        self, layer: int, batch: TeacherBatch, pooling: Pooling, hidden: dict[int, Tensor]
    ) -> Iterator[None]:
        """Keeps a layer's states at the positions, and not the [B, T, D] they are cut from."""
        index_N = batch.position_index

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            state_BTD = last_state(output) if layer == FINAL else _block_state(output)
            if pooling == "none":
                hidden[layer] = state_BTD.flatten(0, 1)[index_N.to(state_BTD.device)]
            else:
                assert batch.attention_mask is not None  # rows are not packed
                mask_BT = batch.attention_mask.to(state_BTD.device)
                hidden[layer] = pooled(state_BTD, mask_BT, pooling)

        handle = self._module(layer).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def _module(self, layer: int) -> nn.Module:
        if layer == FINAL and self.trunk is not None:
            return self.trunk
        if not 0 <= layer < self.num_layers:
            raise ConfigError(
                f"hidden_layers={layer}: expected {FINAL} (after the last norm) or a block of "
                f"{type(self.model).__name__}, 0 to {self.num_layers - 1}."
            )
        return self.blocks[layer]


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """From a folder or a Hub id; refuses what transformers makes up where the files are missing."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            _folder_or_id(name), revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise Refused(
            f"{name}: no tokenizer can be loaded; save one there with "
            f"tokenizer.save_pretrained(folder), or name one with --tokenizer. {error}"
        ) from error
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        raise Refused(
            f"{name}: its tokenizer knows special tokens only, so its files are probably missing; "
            "save them there with tokenizer.save_pretrained(folder), or name another --tokenizer."
        )
    return tokenizer


def logit_width_of(teacher: str, revision: str | None = None) -> int:
    """V by the teacher's config alone, before anything large is read."""
    return int(_text_config(teacher, revision).vocab_size)


def labels_of(teacher: str, revision: str | None = None) -> tuple[str, ...]:
    """Names of the classes by the teacher's config alone."""
    config = _config(teacher, revision)
    return tuple(str(config.id2label[number]) for number in range(config.num_labels))


def problem_type_of(teacher: str, revision: str | None = None) -> ProblemType | None:
    """What the teacher's config alone says its outputs are; None where it says nothing."""
    config = _config(teacher, revision)
    if config.problem_type is not None:
        return PROBLEM_TYPES[config.problem_type]
    return "regression" if config.num_labels == 1 else None


def hidden_width_of(teacher: str, revision: str | None = None) -> int:
    """D by the teacher's config alone."""
    return int(_text_config(teacher, revision).hidden_size)


def _text_config(teacher: str, revision: str | None) -> Any:
    return _config(teacher, revision).get_text_config()


def _config(teacher: str, revision: str | None) -> Any:
    try:
        return AutoConfig.from_pretrained(model_source(teacher), revision=revision)
    except (OSError, ValueError, ImportError) as error:
        raise Refused(f"{teacher}: its config cannot be read. {error}") from error


def weights_digest(model: nn.Module) -> str:
    """xxh3_128 over name, dtype, shape and bytes of all weights as loaded, in order of name."""
    return digest_of(sorted(model.state_dict().items()))


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """xxh3_128 over name, dtype, shape and bytes of named tensors, one after another."""
    digest = xxhash.xxh3_128()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy().data)
    return digest.hexdigest()


def config_hash(model: Any) -> str:
    """xxh3_128 over those settings of the model's config that differ from its defaults."""
    fields = {k: v for k, v in model.config.to_diff_dict().items() if k not in UNHASHED}
    return xxhash.xxh3_128(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def _of_rows(logits_BL: Tensor, width: int, problem: ProblemType) -> LogitsOf:
    """Logits of rows at flat positions: of a row in [B, width], or of an output in [B, L].

    An output is yes with probability sigmoid(z), the softmax of (0, z); or it is a number itself.
    """
    if problem == "single_label":
        return lambda index_n: logits_BL[index_n // width]
    flat_M1 = logits_BL.reshape(-1, 1)
    if problem == "multi_label":
        flat_M2 = torch.cat([torch.zeros_like(flat_M1), flat_M1], dim=1)
        return lambda index_n: flat_M2[index_n]
    return lambda index_n: flat_M1[index_n]


def _chunks(logits_of: LogitsOf, index_N: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(index_N), chunk):
        here = slice(start, min(start + chunk, len(index_N)))
        with torch.no_grad():
            logits_nV = logits_of(index_N[here])
        yield here, logits_nV


def _block_state(output: Any) -> Tensor:
    """Blocks hand on their state alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _find_blocks(trunk: nn.Module) -> nn.ModuleList:
    """The outermost list of modules, and of several the longest (experts are deeper inside)."""
    lists = [
        (name.count("."), -len(module), module)
        for name, module in trunk.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    return min(lists, key=lambda entry: entry[:2], default=(0, 0, nn.ModuleList()))[2]


def _placement(device: str) -> str | dict[str, str]:
    """The `device_map` of from_pretrained."""
    if device == "balanced":
        return device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(
            f"device={device}: expected auto, balanced, cpu, or cuda with or without a number."
        ) from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={device}: torch {torch.__version__} sees no CUDA device.")
    return {"": device}


def _folder_or_id(name: str) -> str:
    """A missing folder would be taken for a Hub id, and its error would speak of the network."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise Refused(f"{name}: no such folder. Name a folder with a saved model, or a Hub id.")
    return name


def model_source(teacher: str) -> str:
    """Folder or Hub id; a folder without a model is refused."""
    source = _folder_or_id(teacher)
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise Refused(f"{teacher}: no config.json here. Name a folder saved by transformers.")
    return source
