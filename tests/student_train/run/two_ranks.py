"""One step of a student with its loss attached, on as many gloo ranks as this is started on.

torchrun --standalone --nproc-per-node 2 -m tests.student_train.run.two_ranks CACHE TAGS PLAIN OUT
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, BertForTokenClassification

from shared.cache import Cache, open_cache
from shared.errors import Refused
from student_train.data.cache_set import CacheSet
from student_train.data.order import Order, OrderSpec
from student_train.data.stream import BatchStream, StreamSpec
from student_train.evaluate.evaluate import evaluate
from student_train.loss.attachment import attach
from student_train.loss.objective import Objective
from student_train.loss.spec import LossSpec
from tests.conftest import llama_config
from tests.student_train.label_caches import TAGS, bert_config, make_teacher

# How the student is spread, and whether its head is tied to its embedding.
CASES = {
    "ddp": False,
    "fsdp": False,  # one group of parameters for each block, one for the rest with the head
    "fsdp-tied": True,
    "fsdp-head": False,  # the head is a group of its own
}


def student_of(cache: Cache, *, tied: bool) -> Any:
    """Narrower than its teacher, so that a projection of hidden states is part of the loss."""
    torch.manual_seed(3)
    student = AutoModelForCausalLM.from_config(
        llama_config(hidden_size=16, tie_word_embeddings=tied)
    )
    attach(
        student,
        Objective(
            spec=LossSpec(),
            num_classes=300,
            soft_weight=1.0,
            hard_weight=0.5,
            hidden_weight=0.25,
            layer_pairs=((-1, -1),),
            deviations={-1: cache.channel_deviation(-1)},
        ),
    )
    return student


def first_batch(cache: Cache, *, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """What this rank gets of the first step."""
    order = Order(cache.block_rows, cache.row_tokens, OrderSpec(batch_tokens=700))
    spec = StreamSpec(rank=rank, world_size=world_size, hidden_layers=(-1,))
    (batch,) = BatchStream(cache, order, spec, max_steps=1)
    return batch


def tagger_of(cache: Cache) -> Any:
    """A tagger that learns from targets and from hard labels, where there are some."""
    torch.manual_seed(3)
    student = BertForTokenClassification(bert_config(id2label=dict(enumerate(TAGS))))
    attach(
        student,
        Objective(
            spec=LossSpec(),
            num_classes=len(TAGS),
            target_kind=cache.manifest.targets.kind,
            soft_weight=1.0,
            hard_weight=0.5,
        ),
    )
    return student


def half_labelled_batch(caches: CacheSet, *, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """What this rank gets of a step over all rows, labelled ones first."""
    tokens = int(caches.row_tokens.sum())
    order = Order(
        caches.block_rows, caches.row_tokens, OrderSpec(batch_tokens=tokens, shuffle=False)
    )
    spec = StreamSpec(rank=rank, world_size=world_size)
    (batch,) = BatchStream(caches, order, spec, max_steps=1)
    return batch


def spread(student: Any, case: str, world_size: int) -> nn.Module:
    if case == "ddp":
        return DistributedDataParallel(student)
    mesh = init_device_mesh("cpu", (world_size,))
    groups = [*student.model.layers, *([student.lm_head] if case == "fsdp-head" else []), student]
    for module in groups:
        fully_shard(module, mesh=mesh)
    return student


def step(student: nn.Module, batch: dict[str, torch.Tensor], *, world_size: int) -> dict[str, Any]:
    """As DistillTrainer: times the number of ranks, since DDP and FSDP average over them."""
    loss = student(**batch)["loss"]
    (loss * world_size).backward()
    parameters = {name.removeprefix("module."): p for name, p in student.named_parameters()}
    gradients = {name: _whole(p.grad) for name, p in parameters.items()}
    torch.optim.SGD(parameters.values(), lr=0.1).step()
    return {
        "loss": loss.detach(),
        "positions": len(batch["position_index"]),
        "labelled": int((batch["labels"] >= 0).sum()),
        "gradients": gradients,
        "weights": {name: _whole(p.detach()) for name, p in parameters.items()},
    }


def _whole(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def tagger_numbers(cache: Cache) -> dict[str, Any]:
    """Of a model other than the cache's teacher, in batches that cut its rows unevenly."""
    tagger = make_teacher("token-classification")
    with torch.no_grad():
        tagger.classifier.weight.mul_(0.1).add_(torch.eye(*tagger.classifier.weight.shape))
    return evaluate(tagger, cache, batch_tokens=170)


def main(cache_path: str, tags_path: str, untagged_path: str, out: str) -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    cache = open_cache(cache_path)
    batch = first_batch(cache, rank=rank, world_size=world_size)
    for case, tied in CASES.items():
        student = spread(student_of(cache, tied=tied), case, world_size)
        found = step(student, batch, world_size=world_size)
        torch.save(found, Path(out) / f"{case}-{rank}.pt")
    caches = CacheSet([open_cache(tags_path), open_cache(untagged_path)])
    batch = half_labelled_batch(caches, rank=rank, world_size=world_size)
    tagger = DistributedDataParallel(tagger_of(caches.first))
    found = step(tagger, batch, world_size=world_size)
    torch.save(found, Path(out) / f"labels-{rank}.pt")
    try:
        attach(
            student, Objective(spec=LossSpec(), num_classes=300, soft_weight=1.0, hard_weight=0.0)
        )
    except Refused as error:
        (Path(out) / f"refused-{rank}.txt").write_text(str(error))
    numbers = tagger_numbers(open_cache(tags_path))
    (Path(out) / f"numbers-{rank}.json").write_text(json.dumps(numbers))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
