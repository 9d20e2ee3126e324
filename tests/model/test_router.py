"""The routers' auxiliary loss is the same for packed rows and for the same sequences padded."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpofast import DPOConfig
from dpofast.data.packing.collate import Layout
from dpofast.data.packing.padded_rows import collate_padded
from dpofast.errors import ConfigError
from dpofast.model.forward import micro_batch, run_batch
from dpofast.model.head import PairLossTask, head_options
from dpofast.model.router import RouterLoss, add_router_loss, check_router_loss, make_router_loss
from dpofast_kernels import make_loss
from tests.exactness import SHORT
from tests.families import tiny_model
from tests.support import float64_throughout, make_trainer, tiny_mixtral, token_pairs

COEFFICIENT = 0.3
FAMILIES = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe"),
    *("flex_olmo", "jetmoe", "granitemoe", "granitemoeshared", "ernie4_5_moe", "minimax_m2"),
    *("granitemoehybrid", "qwen3_5_moe"),
)


def config(tmp_path, **options: Any) -> DPOConfig:
    plain = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": []}
    return DPOConfig(**{**plain, "gradient_checkpointing": False, **options})


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def stock(model: Any) -> tuple[Tensor, Tensor]:
    """Loss of the pairs, and auxiliary loss, of one padded batch by transformers' own forward."""
    batch = collate_padded(SHORT.sequences, SHORT.ref_logps)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.uses}
    output = model(**inputs, use_cache=False, output_router_logits=True)
    logps = output.logits.flatten(0, 1)[batch.scored_positions].log_softmax(-1)
    scored = logps.gather(-1, batch.labels[:, None])[:, 0]
    sums = torch.stack([part.sum() for part in scored.split(batch.bounds.diff().tolist())])
    logratios = sums - batch.ref_logps
    margins = SHORT.beta * (logratios[0::2] - logratios[1::2])
    return -F.logsigmoid(margins).sum(), output.aux_loss


def ours(
    model: Any, layout: Layout, router_loss: RouterLoss
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss that is trained, the auxiliary loss, both as sums over pairs, and the gradients."""
    batch = layout.collate(SHORT.sequences, SHORT.ref_logps)
    loss = make_loss("sigmoid", beta=SHORT.beta)
    options = head_options(model.config)
    task = PairLossTask(batch.labels, batch.bounds, batch.ref_logps, loss, options)
    with micro_batch(model, batch):
        results = run_batch(model, batch, task, router_loss)
        output, logged = add_router_loss(results, router_loss, batch.num_pairs)
        return output.loss, logged["aux_loss"], gradients(model, output.loss)


@pytest.mark.parametrize(
    "name", ["shared", pytest.param("unshared", marks=pytest.mark.slow), "padded"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_a_padded_batch(tmp_path, family, name):
    with float64_throughout():
        model = tiny_model(family).double()
        num_pairs = len(SHORT.sequences) // 2
        router_loss = make_router_loss(model, config(tmp_path, router_aux_loss_coef=COEFFICIENT))
        pairs, aux = stock(model)
        if not isinstance(aux, Tensor):  # transformers 5.17 loses GraniteMoE's router logits
            with pytest.raises(ConfigError, match="gives none when asked for its router logits"):
                check_router_loss(router_loss, model)
            return
        check_router_loss(router_loss, model)
        total = pairs + num_pairs * COEFFICIENT * aux
        expected = gradients(model, total)
        without = gradients(model, stock(model)[0])
        got_total, got_aux, got = ours(model, Layout(name), router_loss)
    assert got_total.item() == pytest.approx(total.item(), rel=1e-12)
    assert got_aux.item() == pytest.approx(num_pairs * aux.item(), rel=1e-12)
    largest = max(gradient.abs().max() for gradient in expected.values())
    share = max((expected[key] - without[key]).abs().max() for key in expected)
    assert share > 1e-3 * largest, "the auxiliary loss has a gradient worth comparing"
    for key, gradient in expected.items():
        assert (got[key] - gradient).abs().max() <= 1e-10 * largest, key


def test_gradient_checkpointing_keeps_the_auxiliary_gradient(tmp_path):
    with float64_throughout():
        model = tiny_model("mixtral").double()
        router_loss = make_router_loss(model, config(tmp_path, router_aux_loss_coef=COEFFICIENT))
        *_, expected = ours(model, Layout("shared"), router_loss)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        *_, got = ours(model, Layout("shared"), router_loss)
    for key, gradient in expected.items():
        assert (got[key] - gradient).abs().max() <= 1e-10, key


@pytest.mark.parametrize("name", ["shared", "padded"])
def test_a_rank_without_pairs_adds_nothing(tmp_path, name):
    model = tiny_model("mixtral")
    router_loss = make_router_loss(model, config(tmp_path, router_aux_loss_coef=COEFFICIENT))
    batch = Layout(name).collate([], [])
    loss, options = make_loss("sigmoid", beta=SHORT.beta), head_options(model.config)
    task = PairLossTask(batch.labels, batch.bounds, batch.ref_logps, loss, options)
    with micro_batch(model, batch):
        results = run_batch(model, batch, task, router_loss)
    output, logged = add_router_loss(results, router_loss, batch.num_pairs)
    assert output.loss.item() == logged["aux_loss"].item() == 0.0
    assert all(not gradient.any() for gradient in gradients(model, output.loss).values())


def test_the_coefficient_is_the_options_or_else_the_configs(tmp_path):
    model = tiny_model("mixtral")
    assert make_router_loss(model, config(tmp_path)).coefficient == 0.001  # transformers' default
    assert make_router_loss(model, config(tmp_path, router_aux_loss_coef=0.5)).coefficient == 0.5
    assert make_router_loss(model, config(tmp_path, router_aux_loss_coef=0)) is None
    assert make_router_loss(tiny_model("llama"), config(tmp_path)) is None
    assert make_router_loss(tiny_model("deepseek_v3"), config(tmp_path)) is None, "as in TRL"


@pytest.mark.parametrize("family", ["llama4", "doge"])
def test_none_is_added_where_transformers_computes_none(tmp_path, caplog, family):
    """Llama 4's class has no such loss, and this Doge has no experts."""
    caplog.set_level("INFO", logger="dpofast")
    model = tiny_model(family)
    assert model.config.router_aux_loss_coef > 0
    assert make_router_loss(model, config(tmp_path)) is None
    (line,) = [record.message for record in caplog.records]
    assert line == f"Routers: no auxiliary loss, as {type(model).__name__} computes none."
    with pytest.raises(ConfigError, match="can't be added, as it"):
        check_router_loss(
            make_router_loss(model, config(tmp_path, router_aux_loss_coef=0.1)), model
        )


def test_what_cannot_be_had_is_refused_in_one_sentence(tmp_path):
    wanted = {"router_aux_loss_coef": 0.1}
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no routers"):
        make_router_loss(tiny_model("llama"), config(tmp_path, **wanted))
    model = tiny_model("mixtral")
    del model.num_experts
    with pytest.raises(
        ConfigError, match="MixtralForCausalLM's routers can't be added, as it lacks"
    ):
        make_router_loss(model, config(tmp_path))
    for value in (-0.1, "much", True):
        with pytest.raises(ConfigError, match="router_aux_loss_coef: got"):
            config(tmp_path, router_aux_loss_coef=value)


def test_reentrant_checkpointing_is_refused(tmp_path):
    model, reentrant = tiny_model("mixtral"), {"use_reentrant": True}
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": reentrant}
    with pytest.raises(ConfigError, match="use_reentrant"):
        make_router_loss(model, config(tmp_path, **options))
    assert make_router_loss(model, config(tmp_path, **options, router_aux_loss_coef=0)) is None
    assert make_router_loss(model, config(tmp_path, gradient_checkpointing=True)) is not None
    model.gradient_checkpointing_enable(reentrant)
    with pytest.raises(ConfigError, match="use_reentrant"):
        make_router_loss(model, config(tmp_path))


def test_a_model_that_balances_its_routers_in_another_way_is_found_out(tmp_path):
    model = tiny_model("mixtral")
    router_loss = make_router_loss(model, config(tmp_path))
    check_router_loss(router_loss, model)
    model.num_experts_per_tok = 1
    with pytest.raises(ConfigError, match="computes it in another way"):
        check_router_loss(router_loss, model)


def test_the_trainer_adds_and_logs_it(tmp_path):
    pairs = token_pairs(6)
    options = {"max_steps": 2}
    trainer = make_trainer(tmp_path, tiny_mixtral(), pairs, eval_dataset=pairs, options=options)
    trainer.train()
    first = next(log for log in trainer.state.log_history if "grad_norm" in log)
    assert first["aux_loss"] > 1
    assert first["loss"] == pytest.approx(math.log(2) + 0.001 * first["aux_loss"], abs=1e-6)
    assert trainer.evaluate()["eval_aux_loss"] > 1


def test_the_trainer_refuses_it_for_a_dense_model(tmp_path):
    with pytest.raises(ConfigError, match="no routers"):
        make_trainer(tmp_path, options={"router_aux_loss_coef": 0.1})
