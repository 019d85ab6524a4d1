"""A smaller model made of some of the teacher's own blocks: a student that starts from something.

Embeddings, norms and the head are copied, and of each list of blocks the picked ones; everything
else about the architecture stays. There is no table of families: a list of blocks is the outermost
list of modules as long as the config says, and whatever in the config lists something for every
block is cut along with it.

Two checks hold this together. Every weight of the picked blocks must find its place, and no place
may stay empty. And on random tokens the new model must give what the teacher gives when its other
blocks hand on what they were given; a block may know its own number, and then it does not.
"""

import copy
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from shared.errors import ConfigError, Refused
from shared.storage.folders import check_free, new_folder
from teacher_cache.config import StudentConfig
from teacher_cache.engines.loading import load_tokenizer
from teacher_cache.engines.probes import SAME_SHAPE
from teacher_cache.engines.streamed_head import same_values

log = logging.getLogger(__name__)

_PROBE_TOKENS = 12


@dataclass(frozen=True, slots=True)
class Blocks:
    """One list of blocks: its name in the model, the picked ones, the option that picks them."""

    name: str
    count: int
    picked: tuple[int, ...]
    option: str


@dataclass(frozen=True, slots=True)
class Smaller:
    """What was made of what: parameters before and after."""

    architecture: str
    blocks: tuple[Blocks, ...]
    teacher_parameters: int
    parameters: int

    @property
    def text(self) -> str:
        picked = "; ".join(
            f"{blocks.name}: {', '.join(map(str, blocks.picked))} of {blocks.count}"
            for blocks in self.blocks
        )
        share = self.parameters / self.teacher_parameters
        return (
            f"{self.architecture}: {picked}; {self.parameters:,} of {self.teacher_parameters:,} "
            f"parameters ({share:.0%})"
        )


def run(config: StudentConfig) -> Smaller:
    """`cache-teacher student`: picks blocks of a model and saves what they make as a model."""
    check_free(config.out)
    transformers.utils.logging.disable_progress_bar()
    teacher = load_model(config.teacher, config.revision)
    tokenizer = load_tokenizer(config.teacher, revision=config.revision)
    lists = block_lists(teacher, config)
    student = smaller(teacher, lists)
    with new_folder(config.out) as folder:
        student.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        saved = reload(folder, type(teacher))
        _warn_of_numbered_blocks(teacher, saved, lists)
    return Smaller(
        type(teacher).__name__, lists, teacher.num_parameters(), student.num_parameters()
    )


def load_model(name: str, revision: str | None = None) -> Any:
    """The model as it was saved, with the head it was saved with; safetensors only."""
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise Refused(f"{name}: no model could be loaded from here. {error}") from error
    architecture = (config.architectures or ["none"])[0]
    if not hasattr(transformers, architecture):
        raise Refused(
            f"{name}: its config names the architecture {architecture}, which is none of "
            "transformers. Name a folder or Hub id that was saved by save_pretrained."
        )
    try:
        return getattr(transformers, architecture).from_pretrained(
            name, revision=revision, dtype="auto", use_safetensors=True
        )
    except OSError as error:
        raise Refused(
            f"{name}: no weights in safetensors format could be loaded. Convert the model with "
            f"save_pretrained. {error}"
        ) from error


def block_lists(teacher: Any, config: StudentConfig) -> tuple[Blocks, ...]:
    """The one list of blocks, or that of the encoder and that of the decoder."""
    if not teacher.config.is_encoder_decoder:
        if config.decoder_layers is not None:
            raise ConfigError(
                f"--decoder-layers: {type(teacher).__name__} is no encoder-decoder, it has one "
                "list of blocks. Pick them with --layers."
            )
        count = teacher.config.get_text_config().num_hidden_layers
        return (_blocks(teacher, teacher, count, config.picked, "--layers"),)
    lists = []
    for side, picked, option in (
        (teacher.get_encoder(), config.picked, "--layers"),
        (teacher.get_decoder(), config.decoder_picked, "--decoder-layers"),
    ):
        count = max((len(each) for _, each in _outermost_lists(side)), default=0)
        lists.append(_blocks(teacher, side, count, picked, option))
    return tuple(lists)


def _blocks(
    teacher: Any, part: nn.Module, count: int, picked: tuple[int, ...], option: str
) -> Blocks:
    found = [each for _, each in _outermost_lists(part) if len(each) == count]
    if count == 0 or len(found) != 1:
        raise Refused(
            f"{type(teacher).__name__}: its config speaks of {count} blocks, but the model has "
            f"{len(found)} lists of as many, expected one. Blocks can be picked only from an "
            "architecture with one list of them."
        )
    beyond = [number for number in picked if number >= count]
    if beyond:
        raise ConfigError(
            f"{option} {','.join(map(str, picked))}: there is no block {beyond[0]}, "
            f"{type(teacher).__name__} has {count} (0 to {count - 1})"
        )
    name = next(name for name, module in teacher.named_modules() if module is found[0])
    return Blocks(name, count, picked, option)


def _outermost_lists(part: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Lists of modules that are inside no other one: experts and sublayers are."""
    inside: tuple[str, ...] = ()
    for name, module in part.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(inside or ("\0",)):
            inside += (f"{name}.",)
            yield name, module


def smaller(teacher: Any, lists: Sequence[Blocks]) -> Any:
    """The model of the picked blocks; its weights are the teacher's own tensors."""
    config = smaller_config(teacher.config, lists)
    with torch.device("meta"):
        student = type(teacher)(config)
    state = _picked_state(teacher.state_dict(), student.state_dict().keys(), lists)
    student.load_state_dict(state, strict=True, assign=True)
    student.tie_weights()
    if teacher.can_generate():
        student.generation_config = teacher.generation_config
    return student


def smaller_config(config: PretrainedConfig, lists: Sequence[Blocks]) -> Any:
    """The config with its counts of blocks changed and its lists over blocks cut."""
    changed = copy.deepcopy(config)
    text_config = changed.get_text_config()
    values = text_config.to_dict()
    for blocks in lists:
        decoder = blocks.option == "--decoder-layers"
        for name in _counts(text_config, values, blocks.count, decoder=decoder):
            setattr(text_config, name, len(blocks.picked))
        if decoder:
            continue
        for name, value in values.items():
            if "layer" in name and isinstance(value, list | tuple) and len(value) == blocks.count:
                setattr(text_config, name, [value[number] for number in blocks.picked])
    try:
        return type(config).from_dict(changed.to_dict())  # checks what belongs together
    except (ValueError, TypeError) as error:
        raise Refused(
            f"{config.model_type}: its config cannot be cut to {len(lists[0].picked)} blocks: "
            f"{error}"
        ) from error


def _counts(
    config: PretrainedConfig, values: Mapping[str, Any], count: int, *, decoder: bool
) -> list[str]:
    """Names of the config's own counts of these blocks, which differ from family to family."""
    known = {config.attribute_map.get("num_hidden_layers", "num_hidden_layers")}
    wanted = {
        name
        for name in values
        if (decoder and "decoder" in name and name.endswith("layers"))
        or (not decoder and (name in known or name in ("num_hidden_layers", "encoder_layers")))
    }
    names = [name for name in wanted if type(values[name]) is int and values[name] == count]
    if not names:
        side = "decoder" if decoder else "model"
        raise Refused(
            f"{config.model_type}: nothing in its config says that the {side} has {count} blocks, "
            "so it cannot say that a smaller one has fewer"
        )
    return names


def _picked_state(
    state: Mapping[str, Tensor], wanted: Any, lists: Sequence[Blocks]
) -> dict[str, Tensor]:
    """The weights of the new model, each the teacher's; every one of a picked block is used.

    What only the block at some place has (the position bias of T5, in block 0) comes from the
    block at that place.
    """
    found, used = {}, set()
    for key in wanted:
        source = next((s for s in _sources(key, lists) if s in state), None)
        if source is None:
            raise Refused(
                f"the smaller model needs the weight {key}, which no picked block has: blocks of "
                "this architecture differ by their place. Keep block 0, or pick others."
            )
        found[key] = state[source]
        used.add(source)
    for blocks in lists:
        own = tuple(f"{blocks.name}.{number}." for number in blocks.picked)
        left = sorted(key for key in state if key.startswith(own) and key not in used)
        if left:
            raise Refused(
                f"{blocks.option} {','.join(map(str, blocks.picked))}: the weight {left[0]} has no "
                "place in the smaller model: blocks of this architecture differ by their place. "
                "Keep block 0, or pick others."
            )
    return found


def _sources(key: str, lists: Sequence[Blocks]) -> Iterator[str]:
    for blocks in lists:
        if key.startswith(f"{blocks.name}."):
            place, _, rest = key.removeprefix(f"{blocks.name}.").partition(".")
            yield f"{blocks.name}.{blocks.picked[int(place)]}.{rest}"
    yield key


def reload(folder: Path, model_class: Any) -> Any:
    """The saved model; weights that are missing or too many are an error of ours."""
    model, loaded = model_class.from_pretrained(
        folder, dtype="auto", use_safetensors=True, output_loading_info=True
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not loaded[what], f"{what}: {json.dumps(sorted(map(str, loaded[what])))}"
    return model


def _warn_of_numbered_blocks(teacher: Any, student: Any, lists: Sequence[Blocks]) -> None:
    found, expected = probe(student), probe_without(teacher, lists)
    if not same_values(found, expected, SAME_SHAPE.get(expected.dtype, 0.0)):
        log.warning(
            "%s: the picked blocks do not compute here what they compute in the teacher (logits "
            "differ by up to %.2g): they depend on their number. The student can be trained, but "
            "starts from another function",
            *(type(teacher).__name__, float((found - expected).abs().max())),
        )


@torch.no_grad()
def probe(model: Any) -> Tensor:
    """What a model says of one row of random tokens: logits, or states if it has no head."""
    generator = torch.Generator().manual_seed(0)
    classes = model.get_input_embeddings().weight.shape[0]
    ids_BT = torch.randint(classes, (1, _PROBE_TOKENS), generator=generator)
    inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids_BT.flip(1)
    return model.eval()(**inputs)[0]


def probe_without(teacher: Any, lists: Sequence[Blocks]) -> Tensor:
    """What `probe` gives of a model whose other blocks hand on the states they were given."""
    with ExitStack() as stack:
        for blocks in lists:
            modules = teacher.get_submodule(blocks.name)
            for number in set(range(blocks.count)) - set(blocks.picked):
                stack.enter_context(_passed_by(modules[number]))
        return probe(teacher)


@contextmanager
def _passed_by(block: nn.Module) -> Iterator[None]:
    def hand_on(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        states = (*args, *kwargs.values())[0]
        return states if isinstance(output, Tensor) else (states, *output[1:])

    handle = block.register_forward_hook(hand_on, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
