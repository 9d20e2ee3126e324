from __future__ import annotations

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch

from dpofast.data.packing.collate import Layout
from dpofast.errors import ConfigError, ModelError
from dpofast.model.head import head_forwards
from dpofast.model.scorer import SequenceScorer
from tests import support
from tests.families import tiny_model
from tests.support import (
    BETA,
    PlainDPO,
    answer_logps,
    float64_throughout,
    tiny_llama,
    token_pairs,
)

peft = pytest.importorskip("peft", reason="needs the extra `peft`")

LEARNING_RATE = 2e-2


def make_trainer(folder, model, options=None, **arguments):
    fewer = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": LEARNING_RATE,
        "max_steps": 5,
    }
    options = {**fewer, **(options or {})}
    return support.make_trainer(folder, model, token_pairs(8), options=options, **arguments)


def losses(trainer):
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "grad_norm" in log]


def lora(**options):
    return peft.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "lora_alpha": 32, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        pytest.param({"lora_dropout": 0.3}, marks=pytest.mark.slow),
        {"init_lora_weights": False},
        pytest.param({"use_dora": True}, marks=pytest.mark.slow),
        pytest.param({"use_rslora": True}, marks=pytest.mark.slow),
    ],
    ids=["attention", "on the head", "head saved whole", "dropout", "not fresh", "dora", "rslora"],
)
def test_a_peft_config_trains_as_plain_dpo(tmp_path, options):
    with float64_throughout():
        naive = tiny_llama().double()
        torch.manual_seed(3)  # the trainer's seed for making the adapter
        naive = peft.get_peft_model(naive, lora(**{**options, "lora_dropout": 0.0}))
        expected = PlainDPO(naive, BETA, LEARNING_RATE).train(token_pairs(8), 4, 5, seed=3)
        model = tiny_llama().double()
        trainer = make_trainer(tmp_path, model, peft_config=lora(**options))
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float64}
        got = losses(trainer)
    assert abs(expected[-1][0] / math.log(2) - 1) > 0.05
    np.testing.assert_allclose(got, [loss for loss, _ in expected], atol=1e-8, rtol=0)


def test_an_adapter_on_the_head_keeps_its_own_rounding_in_bf16():
    """The head and the adapter round separately in bf16, as in peft's own forward.

    Adding the adapter to the head's weight first would round most of a small adapter away.
    """
    config = lora(target_modules=["lm_head"], init_lora_weights=False, lora_alpha=1)
    model = peft.get_peft_model(tiny_llama(hidden_size=256), config)
    prompt, answer = list(range(3, 40)), list(range(40, 200))

    def effect(scorer):
        """What the adapter adds to each token's log-prob."""
        with torch.no_grad():
            on = scorer(model)
            with model.disable_adapter():
                return on - scorer(model)

    def ours(model):
        context = partial(torch.autocast, "cpu", torch.bfloat16)
        scores = SequenceScorer(model, context, Layout("padded"))([(prompt, answer)])
        return torch.from_numpy(scores[0])

    def exact(model):
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        return logits.double().log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]

    expected = effect(exact)
    error = (effect(ours) - expected).norm() / expected.norm()
    assert error < 0.1, error


def test_an_adapter_loaded_for_inference_is_refused(tmp_path):
    model = peft.get_peft_model(tiny_llama(), lora())
    model.save_pretrained(tmp_path / "adapter")
    frozen = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    with pytest.raises(ModelError, match="is_trainable=True"):
        make_trainer(tmp_path, frozen, options={"gradient_checkpointing": True})


def test_a_fresh_adapters_reference_is_the_model_below_it(tmp_path):
    full = make_trainer(tmp_path, tiny_llama(), options={"max_steps": 1})
    full.train()
    adapter = make_trainer(tmp_path, tiny_llama(), peft_config=lora())
    adapter.train()
    assert adapter.reference.identity == full.reference.identity
    assert adapter.reference.store.totals().rows_scored == 0


def test_an_adapter_trained_before_belongs_to_the_reference(tmp_path):
    first = make_trainer(tmp_path / "a", tiny_llama(), peft_config=lora())
    first.train()
    first.save_model()
    model = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "a" / "run", is_trainable=True)
    reference = copy.deepcopy(model)
    second = make_trainer(tmp_path / "b", model)
    got = losses(second)
    assert got[0] == pytest.approx(math.log(2), abs=1e-6)
    assert second.reference.identity != first.reference.identity
    expected = PlainDPO(reference, BETA, LEARNING_RATE).train(token_pairs(8), 4, 5, seed=3)
    np.testing.assert_allclose(got, [loss for loss, _ in expected], rtol=1e-4)


def test_the_saved_adapter_loads_and_gives_the_trainers_log_probs(tmp_path):
    trainer = make_trainer(tmp_path, tiny_llama(), peft_config=lora())
    trainer.train()
    metrics = trainer.evaluate(trainer.train_dataset)
    trainer.save_model()
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "run")
    with torch.no_grad():
        logps = [
            answer_logps(loaded, pair["prompt_ids"], pair["chosen_ids"]).item()
            for pair in token_pairs(8)
        ]
    assert metrics["eval_logps/chosen"] == pytest.approx(np.mean(logps), rel=1e-5)


def test_a_resumed_adapter_run_goes_on_as_if_never_stopped(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    expected = losses(make_trainer(tmp_path, tiny_llama(), peft_config=lora(), options=saving))
    resumed = make_trainer(tmp_path, tiny_llama(), peft_config=lora(), options=saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    got = [log["loss"] for log in resumed.state.log_history if "grad_norm" in log]
    assert got == expected


def test_heads_that_one_weight_cannot_stand_for_are_refused():
    model = peft.get_peft_model(tiny_llama(), lora(target_modules=["lm_head"], use_dora=True))
    with pytest.raises(ModelError, match="DoRA"):
        head_forwards(model.get_base_model().get_output_embeddings())
    with pytest.raises(ModelError, match="quantised"):
        head_forwards(torch.ao.nn.quantized.Linear(4, 8))


def test_adapters_that_add_tokens_and_double_adapters_are_refused(tmp_path):
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ConfigError, match="LoRA"):
        make_trainer(tmp_path, tiny_llama(), peft_config=prefix)
    wrapped = peft.get_peft_model(tiny_llama(), lora())
    with pytest.raises(ConfigError, match="adapter already"):
        make_trainer(tmp_path, wrapped, peft_config=lora())
    with pytest.raises(ConfigError, match="PeftConfig"):
        make_trainer(tmp_path, tiny_llama(), peft_config={"r": 8})


def test_names_that_nothing_in_the_model_has_are_logged(tmp_path, caplog):
    right = {"target_modules": ["q_proj", "self_attn.v_proj"], "modules_to_save": ["lm_head"]}
    make_trainer(tmp_path, tiny_llama(), peft_config=lora(**right))
    # names of older versions, which peft turns into parameters of today
    older = {"target_modules": ["q_proj", "w1", "w2", "w3"], "r": 2}
    make_trainer(tmp_path, support.tiny_mixtral(), peft_config=lora(**older))
    assert "is called" not in caplog.text
    wrong = {"target_modules": ["q_proj", "v_porj"], "modules_to_save": ["lm_haed"]}
    make_trainer(tmp_path, tiny_llama(), peft_config=lora(**wrong))
    assert "nothing in LlamaForCausalLM is called 'v_porj', which target_modules" in caplog.text
    assert "is called 'lm_haed', which modules_to_save (lora_modules_to_save" in caplog.text
    with pytest.raises(ConfigError, match=r"can't make .*; set lora_target_modules on the command"):
        make_trainer(tmp_path, tiny_model("qwen3_5"), peft_config=lora(target_modules=None))
