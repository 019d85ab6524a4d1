"""The folder of a student whose vectors stand in for a teacher's: what serves it beside the model.

D channels of the teacher.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from shared.cache import Cache
from shared.errors import CacheMismatch, CorruptRun
from student_train.loss.layers import PROJECTIONS, projection_name

_DENSE, _POOLING = "2_Dense", "1_Pooling"
_MODES = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}


def layer_pair(cache: Cache) -> tuple[int, int]:
    """The deepest cached layer, and the student's final state."""
    layer = cache.manifest.hidden.deepest
    assert layer is not None  # a cache of states has some
    return layer, -1


def projection_of(student: Any, cache: Cache) -> nn.Linear | None:
    """The map from the student's final state to the teacher's, where their widths differ."""
    if not hasattr(student, PROJECTIONS):
        return None
    projections: nn.ModuleDict = getattr(student, PROJECTIONS)
    modules = dict(projections.named_children())
    projection = modules.get(projection_name(*layer_pair(cache)))
    return projection if isinstance(projection, nn.Linear) else None


def save(folder: Path, projection: nn.Linear | None, width: int, cache: Cache) -> None:
    """What stands beside the model: modules that `SentenceTransformer(folder)` loads.

    The transformer, its pooling, and where there is one the projection. Of the states of tokens
    there is no such model, only the projection.
    """
    hidden = cache.manifest.hidden
    if projection is not None:
        weights = {"linear.weight": projection.weight.detach().cpu().contiguous()}
        (folder / _DENSE).mkdir(exist_ok=True)
        save_file(weights, folder / _DENSE / "model.safetensors")
        shape = {"in_features": projection.in_features, "out_features": projection.out_features}
        activation = {"activation_function": "torch.nn.modules.linear.Identity"}
        _write(folder / _DENSE / "config.json", {**shape, "bias": False, **activation})
    if hidden.pooling == "none":
        return
    (folder / _POOLING).mkdir(exist_ok=True)
    modes = {
        f"pooling_mode_{mode}": mode == _MODES[hidden.pooling]
        for mode in ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")
    }
    _write(folder / _POOLING / "config.json", {"word_embedding_dimension": width, **modes})
    length = {"max_seq_length": cache.manifest.preprocessing.max_length, "do_lower_case": False}
    _write(folder / "sentence_bert_config.json", length)
    parts = [("", "Transformer"), (_POOLING, "Pooling")]
    parts += [(_DENSE, "Dense")] if projection is not None else []
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": path,
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, (path, kind) in enumerate(parts)
    ]
    _write(folder / "modules.json", modules)


def copy_modules(source: Path, target: Path) -> None:
    """What `save` wrote beside a student, into another folder of the same model."""
    for name in (_DENSE, _POOLING):
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
    for name in ("sentence_bert_config.json", "modules.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def load_projection(name: str, student: Any, cache: Cache) -> None:
    """Gives a student the projection of its folder; one that needs it and has none is refused."""
    teacher_layer, student_layer = layer_pair(cache)
    wanted = cache.manifest.hidden.width_of(teacher_layer)
    width = int(student.config.get_text_config().hidden_size)
    file = Path(name) / _DENSE / "model.safetensors"
    if not file.is_file():
        if width == wanted:
            return
        raise CacheMismatch(
            f"{name}: its vectors have {width} channels, those of {cache.path} {wanted}, and "
            f"there is no {_DENSE}/ that maps one to the other. Name the folder of a finished run."
        )
    weight = load_file(file).get("linear.weight")
    if weight is None or weight.shape != (wanted, width):
        found = "none" if weight is None else tuple(weight.shape)
        raise CorruptRun(
            f"{file}: found a linear.weight of shape {found}, expected ({wanted}, {width})"
        )
    projection = nn.Linear(width, wanted, bias=False)
    with torch.no_grad():
        projection.weight.copy_(weight)
    maps = nn.ModuleDict({projection_name(teacher_layer, student_layer): projection})
    setattr(student, PROJECTIONS, maps)


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
