"""The hooks on a real model: the loss they return against dense references."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
)

from shared.cache import Cache, open_cache
from shared.errors import ConfigError
from student_train.data.cache_set import CacheSet
from student_train.data.order import Order, OrderSpec
from student_train.data.stream import BatchStream, StreamSpec
from student_train.evaluate.evaluate import evaluate
from student_train.loss.attachment import attach
from student_train.loss.head import probe_head
from student_train.loss.objective import Objective
from student_train.loss.spec import LossSpec
from student_train.tasks.table import task_of
from tests.conftest import llama_config


def batches(cache: Cache, batch_tokens: int = 1000, **spec: Any) -> list[dict[str, torch.Tensor]]:
    order_spec = OrderSpec(batch_tokens=batch_tokens, shuffle=False, epochs=1)
    order = Order(cache.block_rows, cache.row_tokens, order_spec)
    spec = {"arrangement": task_of(cache.manifest).arrangement} | spec
    stream = BatchStream(cache, order, StreamSpec(**spec), max_steps=order.steps_for_epochs(1))
    return list(stream)


def objective(**changes: Any) -> Objective:
    options: dict[str, Any] = {
        "spec": LossSpec(),
        "num_classes": 300,
        "soft_weight": 1.0,
        "hard_weight": 0.5,
    }
    return Objective(**options | changes)


def sequences(cache: Any, **spec: Any) -> list[tuple[list[int], list[int]]]:
    """Tokens, and which of two texts they are of, of every sequence of a run; sorted."""
    found = []
    for batch in batches(cache, **spec):
        types = batch.get("token_type_ids", torch.zeros_like(batch["input_ids"]))
        for ids, kinds, mask in zip(
            batch["input_ids"], types, batch["attention_mask"] == 1, strict=True
        ):
            found.append((ids[mask].tolist(), kinds[mask].tolist()))
    return sorted(found)


def test_packed_rows_are_read_beside_others_in_any_order(capture):
    """A document of a packed row is a sequence of its own: its targets know no other."""
    packed, plain = (
        open_cache(capture(**options))
        for options in ({"pack": True, "limit_documents": 40}, {"limit_documents": 60})
    )
    expected = sorted(sequences(packed) + sequences(plain))
    for caches in ([packed, plain], [plain, packed]):
        assert sequences(CacheSet(caches)) == expected


def live_logits(model: Any, row: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=row.input_ids[None]).logits[0].double()


@pytest.fixture(scope="module")
def teacher(teacher_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(teacher_dir).eval()


def test_the_teacher_as_its_own_student_has_no_kl_at_any_position(teacher, cache_dir):
    cache = open_cache(cache_dir)
    worst = 0.0
    total = count = 0
    for row in cache:
        logits = live_logits(teacher, row)[row.positions]
        live = logits.log_softmax(-1)
        lp = row.targets.logprobs.double()
        cells = torch.cat([lp, row.targets.tail_mass.double().log()[:, None]], 1)
        q_entries = live.gather(1, row.targets.ids)
        q_tail = live.scatter(1, row.targets.ids, -torch.inf).logsumexp(1, keepdim=True)
        kl = (cells.exp() * (cells - torch.cat([q_entries, q_tail], 1))).nan_to_num(0).sum(1)
        worst, total, count = max(worst, float(kl.max())), total + float(kl.sum()), count + len(kl)
    assert worst <= 1e-3
    assert total / count <= 1e-4
    numbers = evaluate(teacher, cache, batch_tokens=1000)
    assert numbers["kl_bucketed"] == pytest.approx(total / count, abs=2e-6)
    assert numbers["agreement"] > 0.999  # codes of two near-equal entries may swap them
    assert numbers["loss"] == pytest.approx(numbers["teacher_loss"], rel=1e-4)


def test_packed_rows_match_the_teacher_alone_at_every_position(teacher, capture):
    cache = open_cache(capture(pack=True))
    assert any(len(block.segments) > len(block.row_ids) for block in blocks(cache))
    numbers = evaluate(teacher, cache, batch_tokens=1000)
    assert numbers["kl_bucketed"] <= 1e-4
    assert numbers["loss"] == pytest.approx(numbers["teacher_loss"], rel=1e-4)


def blocks(cache: Cache) -> list[Any]:
    return [cache.read_block(index) for index in range(cache.num_blocks)]


def test_loss_and_gradient_equal_a_dense_reference(cache_dir):
    cache = open_cache(cache_dir)
    torch.manual_seed(3)
    student = AutoModelForCausalLM.from_config(llama_config(tie_word_embeddings=True)).double()
    batch = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in batches(cache)[1].items()
    }
    attachment = attach(student, objective())
    output = student(**batch)
    output["loss"].backward()
    found = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    attachment.detach()
    student.zero_grad()

    logits = student(batch["input_ids"], batch["attention_mask"]).logits.flatten(0, 1)
    logp = logits[batch["position_index"]].log_softmax(-1)
    ids, lp, log_tail = (
        batch["target_ids"].long(),
        batch["target_logprobs"],
        batch["target_log_tail"],
    )
    q_tail = logp.scatter(1, ids, -torch.inf).logsumexp(1)
    entries = (lp.exp() * (lp - logp.gather(1, ids))).sum(1)
    soft = entries + log_tail.exp() * (log_tail - q_tail)
    hard = -logp.gather(1, batch["labels"][:, None])[:, 0]
    loss = (soft.sum() + 0.5 * hard.sum()) / int(batch["num_positions"])
    loss.backward()
    # The count of positions divides in float32: 6e-8.
    torch.testing.assert_close(output["loss"], loss, rtol=1e-7, atol=0)
    for name, parameter in student.named_parameters():
        # The norms of a Llama work in float32 whatever the weights are.
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-8)


def test_padding_carries_no_loss(cache_dir):
    """What stands behind a row's end must not matter: only real positions do."""
    cache = open_cache(cache_dir)
    torch.manual_seed(3)
    student = AutoModelForCausalLM.from_config(llama_config()).eval()
    batch = next(b for b in batches(cache) if (b["attention_mask"] == 0).any())
    other = dict(batch)
    noise = torch.randint(0, 300, batch["input_ids"].shape)
    other["input_ids"] = torch.where(batch["attention_mask"] == 0, noise, batch["input_ids"])
    attach(student, objective())
    with torch.no_grad():
        assert float(student(**other)["loss"]) == float(student(**batch)["loss"])


def test_temperature_and_hidden_terms_reach_the_loss(cache_dir):
    cache = open_cache(cache_dir)
    torch.manual_seed(3)
    student = AutoModelForCausalLM.from_config(llama_config())
    batch = batches(cache, temperature=2.0, hidden_layers=(-1,))[0]
    deviation = cache.channel_deviation(-1)
    attach(
        student,
        objective(
            spec=LossSpec(temperature=2.0),
            hidden_weight=0.25,
            layer_pairs=((-1, -1),),
            deviations={-1: deviation},
        ),
    )
    output = student(**batch)
    states = student.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    error = states.flatten(0, 1)[batch["position_index"]] - batch["hidden.-1"].float()
    hidden = (error / deviation).square().mean(1).sum()
    torch.testing.assert_close(output["hidden"], hidden.detach(), rtol=1e-4, atol=0)
    expected = output["soft"] + 0.5 * output["hard"] + 0.25 * output["hidden"]
    torch.testing.assert_close(
        output["loss"].detach(), expected / int(batch["num_positions"]), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("hidden_loss", ["mse", "cosine", "contrastive"])
def test_the_hidden_term_is_a_mean_over_what_has_states(capture, hidden_loss):
    """int8 states of every fourth position, of packed rows: value and gradient by hand."""
    cache = open_cache(
        capture(hidden_layers=(-1, 0), hidden_codec="int8", hidden_every=4, pack=True)
    )
    torch.manual_seed(3)
    student = AutoModelForCausalLM.from_config(llama_config())
    batch = batches(cache, 600, hidden_layers=(-1,), hidden_every=4)[0]
    options = {"hidden_loss": hidden_loss, "layer_pairs": ((-1, -1),), "hidden_weight": 0.25}
    deviation = cache.channel_deviation(-1)
    objective_ = objective(soft_weight=0.0, hard_weight=0.0, deviations={-1: deviation}, **options)
    attachment = attach(student, objective_)
    output = student(**batch)
    output["loss"].backward()
    found = student.model.embed_tokens.weight.grad.clone()
    attachment.detach()
    student.zero_grad()

    ids, mask = batch["input_ids"], batch["attention_mask"]
    states_BTD = student.model(ids, mask).last_hidden_state
    sequences: dict[int, list[int]] = {}
    for number, row in enumerate(batch["row_ids"].tolist()):
        sequences.setdefault(row, []).append(number)
    rows = []
    for row_id, numbers in sequences.items():
        segments = [states_BTD[n, : int(mask[n].sum()) - 1] for n in numbers]  # not the last token
        row = next(row for row in cache if row.row_id == row_id)
        rows.append((torch.cat(segments)[::4], row.hidden[-1].float()))
    if hidden_loss == "contrastive":
        pooled = [torch.stack([pair[i].mean(0) for pair in rows]) for i in (0, 1)]
        unit = [x / x.norm(dim=1, keepdim=True) for x in pooled]
        losses = -(unit[0] @ unit[1].T / 0.05).log_softmax(1).diagonal()
    else:
        s, t = (torch.cat([pair[i] for pair in rows]) for i in (0, 1))
        cosine = 1 - (s * t).sum(1) / s.norm(dim=1) / t.norm(dim=1)
        losses = cosine if hidden_loss == "cosine" else ((s - t) / deviation).square().mean(1)
    mean = losses.mean()
    (0.25 * mean).backward()
    torch.testing.assert_close(output["loss"], 0.25 * mean, rtol=1e-4, atol=1e-6)
    of_positions = output["hidden"] / int(batch["num_positions"])
    torch.testing.assert_close(of_positions, mean.detach(), rtol=1e-4, atol=1e-6)
    gradient = student.model.embed_tokens.weight.grad
    torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-6)


def test_other_calls_keep_the_usual_output(cache_dir):
    student = AutoModelForCausalLM.from_config(llama_config()).eval()
    ids = torch.tensor([[1, 2, 3]])
    before = student(input_ids=ids).logits
    attachment = attach(student, objective())
    torch.testing.assert_close(student(input_ids=ids).logits, before, rtol=0, atol=0)
    attachment.detach()
    assert not student._forward_hooks
    assert not student._forward_pre_hooks


def test_a_capped_head_is_recognised(cache_dir):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        final_logit_softcapping=5.0,
    )
    student = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        student.model.embed_tokens.weight.mul_(40)  # tied: logits far into the cap
    head = probe_head(student, student.get_output_embeddings(), 300)
    assert head.linear
    assert head.softcap == 5.0
    assert head.scale == 1.0


def test_an_odd_head_falls_back_to_full_logits(cache_dir, caplog):
    """A head whose logits are no linear function still gives the right loss, with a warning."""
    cache = open_cache(cache_dir)
    torch.manual_seed(3)
    student = AutoModelForCausalLM.from_config(llama_config()).eval()
    plain = student.lm_head.forward
    student.lm_head.forward = lambda states: plain(states) + plain(states).sin()
    batch = batches(cache)[0]
    logits = student(batch["input_ids"], batch["attention_mask"]).logits.flatten(0, 1)
    hard = -logits[batch["position_index"]].log_softmax(-1).gather(1, batch["labels"][:, None])
    attach(student, objective())
    assert "full logits are computed" in caplog.text
    output = student(**batch)
    torch.testing.assert_close(output["hard"], hard.sum().detach(), rtol=1e-5, atol=0)


def gradients_of(student: Any, some: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Of the summed losses of micro-batches."""
    student.zero_grad()
    for batch in some:
        student(**batch)["loss"].backward()
    return {name: parameter.grad.clone() for name, parameter in student.named_parameters()}


def with_hidden(cache: Cache) -> Objective:
    """An objective with every kind of term."""
    return objective(
        hidden_weight=0.25, layer_pairs=((-1, -1),), deviations={-1: cache.channel_deviation(-1)}
    )


def test_a_micro_batch_without_positions_has_no_loss_and_no_gradient(cache_dir):
    """That of a rank for which a step has no row left; also where no rank has a position."""
    cache = open_cache(cache_dir)
    torch.manual_seed(3)
    student = AutoModelForCausalLM.from_config(llama_config(hidden_size=16))
    attach(student, with_hidden(cache))
    batch = batches(cache, batch_tokens=1, world_size=2, rank=1, hidden_layers=(-1,))[0]
    assert len(batch["position_index"]) == 0
    assert batch["num_positions"] > 0
    for count in (batch["num_positions"], torch.tensor(0)):
        found = gradients_of(student, [batch | {"num_positions": count}])
        output = student(**batch | {"num_positions": count})
        assert all(value.detach() == 0 for value in output.values())
        assert "soft" in output
        assert "hidden" in output
        assert any("projections" in name for name in found)
        assert not any(gradient.any() for gradient in found.values())
        assert all(gradient.isfinite().all() for gradient in found.values())


def test_a_row_without_positions_carries_no_loss(cache_dir):
    """The gradient is that of the other rows alone."""
    cache = open_cache(cache_dir)
    torch.manual_seed(3)
    student = AutoModelForCausalLM.from_config(llama_config()).eval()
    attach(student, objective())
    batch = batches(cache, batch_tokens=400)[0]
    rows, width = batch["input_ids"].shape
    assert rows > 1
    others = batch["position_index"] >= width  # all but those of the first row
    by_position = {"labels", "position_index", "entropy", *(k for k in batch if "target" in k)}
    silent = {k: v[others] if k in by_position else v for k, v in batch.items()}
    assert 0 < len(silent["labels"]) < len(batch["labels"])
    alone = {
        k: v[1:] if k in ("input_ids", "attention_mask", "row_ids") else v
        for k, v in silent.items()
    }
    alone["position_index"] = silent["position_index"] - width
    found, expected = gradients_of(student, [silent]), gradients_of(student, [alone])
    for name, gradient in expected.items():
        assert gradient.any()
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("accumulation", [2, 4])
def test_a_step_cut_into_micro_batches_has_the_same_gradient(cache_dir, accumulation, world_size):
    """Of unequal counts of positions; each divides by the count of the whole step."""
    cache = open_cache(cache_dir)
    torch.manual_seed(3)
    student = AutoModelForCausalLM.from_config(llama_config(hidden_size=16))
    attach(student, with_hidden(cache))
    whole = batches(cache, hidden_layers=(-1,))[:1]
    parts = [
        batch
        for rank in range(world_size)
        for batch in batches(
            cache,
            accumulation=accumulation,
            world_size=world_size,
            rank=rank,
            hidden_layers=(-1,),
        )[:accumulation]
    ]
    counts = [len(batch["labels"]) for batch in parts]
    assert sum(counts) == len(whole[0]["labels"])
    assert len(set(counts)) > 1
    found, expected = gradients_of(student, parts), gradients_of(student, whole)
    for name, gradient in expected.items():
        # Sums of float32 in another order.
        largest = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * largest)


def test_adapters_on_the_trunk_get_the_gradient_of_the_dense_loss(cache_dir):
    """And the frozen head and trunk get none."""
    from student_train.config import AdapterSpec
    from student_train.student.adapters import add_adapters

    cache = open_cache(cache_dir)
    torch.manual_seed(3)
    student = add_adapters(
        AutoModelForCausalLM.from_config(llama_config()), AdapterSpec(rank=2), "causal-lm"
    )
    adapters = {n: p for n, p in student.named_parameters() if "lora_" in n}
    for parameter in adapters.values():
        torch.nn.init.normal_(parameter, std=0.1)  # the second factor starts at 0
    batch = batches(cache, batch_tokens=300)[0]
    attachment = attach(student, objective(soft_weight=0.0, hard_weight=1.0))
    assert attachment.head.linear
    output = student(**batch)
    output["loss"].backward()
    found = {name: parameter.grad.clone() for name, parameter in adapters.items()}
    frozen = [p for n, p in student.named_parameters() if n not in adapters]
    assert frozen
    assert all(parameter.grad is None for parameter in frozen)
    attachment.detach()
    student.zero_grad()
    logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logp = logits.flatten(0, 1)[batch["position_index"]].log_softmax(-1)
    dense = -logp.gather(1, batch["labels"][:, None]).sum() / int(batch["num_positions"])
    dense.backward()
    torch.testing.assert_close(output["loss"].detach(), dense.detach(), rtol=1e-5, atol=0)
    for name, parameter in adapters.items():
        assert parameter.grad.any()
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7)


def from_the_live_teacher(teacher: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with what the teacher says now, unrounded, at the ids that were kept."""
    with torch.no_grad():
        logits = teacher(batch["input_ids"], batch["attention_mask"]).logits.flatten(0, 1)
    logp = logits[batch["position_index"]].log_softmax(-1)
    ids = batch["target_ids"].long()
    return batch | {
        "target_logprobs": logp.gather(1, ids),
        "target_log_tail": logp.scatter(1, ids, -torch.inf).logsumexp(1),
    }


def loss_curve(some: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Soft loss per position of one student after each batch, and where its head ends."""
    torch.manual_seed(3)
    student = AutoModelForCausalLM.from_config(llama_config())
    attach(student, objective(hard_weight=0.0))
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    curve = []
    for batch in some:
        loss = student(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.detach())
    return torch.stack(curve), student.lm_head.weight.detach()


def test_a_cached_teacher_trains_as_one_in_the_loop(teacher, cache_dir):
    """The same loss curve within what the codec rounds: a KL of 1e-4 on average."""
    some = batches(open_cache(cache_dir))[:20]
    cached, cached_head = loss_curve(some)
    live, live_head = loss_curve([from_the_live_teacher(teacher, batch) for batch in some])
    assert not torch.equal(cached, live)
    assert cached[-5:].mean() < cached[:5].mean() / 1.2
    torch.testing.assert_close(cached[0], live[0], rtol=0, atol=1e-4)
    # Steps add what their targets were rounded by.
    torch.testing.assert_close(cached, live, rtol=0, atol=2e-3)
    torch.testing.assert_close(cached_head, live_head, rtol=0, atol=2e-3)


def test_the_answers_of_a_head_with_an_offset_are_those_of_its_own_logits():
    """BART adds a bias to its logits that is no part of its head."""
    config = BartConfig(
        vocab_size=60,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    student = BartForConditionalGeneration(config).eval()
    student.final_logits_bias.copy_(3 * torch.randn(1, 60))
    ids = torch.randint(3, 60, (2, 5))
    inputs = {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    logits = student(**inputs).logits.flatten(0, 1)[[1, 7]].detach()
    labels = torch.tensor([4, 9])
    attach(student, objective(num_classes=60, with_answers=True))
    output = student(
        **inputs,
        position_index=torch.tensor([1, 7]),
        labels=labels,
        num_positions=torch.tensor(2),
        num_labels=torch.tensor(2),
    )
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(output["answers.loss"], expected)
    torch.testing.assert_close(output["answers.loss"].sum(), output["hard"])
    assert torch.equal(output["answers.student"], logits.argmax(1))


def test_an_objective_of_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="found 'top-k', expected one of topk, adaptive"):
        objective(target_kind="top-k")
