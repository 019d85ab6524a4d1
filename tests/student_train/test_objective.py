"""The hooks on a real model: the loss they return against dense references."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from shared.cache import Cache, open_cache
from student_train.evaluate import evaluate
from student_train.loss_spec import LossSpec
from student_train.objective import Objective, attach, probe_head
from student_train.order import Order, OrderSpec
from student_train.stream import BatchStream, StreamSpec
from tests.conftest import llama_config


def batches(cache: Cache, batch_tokens: int = 1000, **spec: Any) -> list[dict[str, torch.Tensor]]:
    order_spec = OrderSpec(batch_tokens=batch_tokens, shuffle=False, epochs=1)
    order = Order(cache.block_rows, cache.row_tokens, order_spec)
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
