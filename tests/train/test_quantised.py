"""Adapters on quantised models train as on dequantised ones, whatever runs between steps."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import BitsAndBytesConfig, TrainerCallback

from dpofast import DPOConfig
from dpofast.errors import ConfigError, ModelError
from dpofast.train.policy import with_quantisation
from tests.quantised import KINDS, adapter, load, repacks_on_this_machine, save_base
from tests.support import history, make_trainer, token_pairs, train

peft = pytest.importorskip("peft", reason="needs the extra `peft`")

STEPS = 10
# Kinds that wait for `make test-slow` where one kind shows enough: only their layers differ.
SLOW = {kind: pytest.param(kind, marks=pytest.mark.slow) for kind in ("fp4", "nf4", "8bit")}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def run(folder, model, **options):
    arguments = {"peft_config": adapter(), **options.pop("arguments", {})}
    trainer = make_trainer(folder, model, options={"max_steps": STEPS, **options}, **arguments)
    return train(trainer), trainer


@pytest.mark.parametrize("kind", [SLOW["fp4"], SLOW["nf4"], "nested", "8bit"])
def test_ten_steps_equal_those_on_dequantised_weights(tmp_path, base, kind):
    quantised, _ = run(tmp_path / "quantised", load(base, kind))
    dequantised = load(base, kind).dequantize(dtype=torch.float32)
    expected, _ = run(tmp_path / "dequantised", dequantised)
    np.testing.assert_allclose(quantised, expected, rtol=2e-6)
    assert quantised[-1][0] < 0.69  # and they train


class LooksBetweenSteps(TrainerCallback):
    """Runs the model as a user would, in eval mode."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.eval()
        with torch.no_grad():
            model(torch.tensor([[3, 4, 5]]))
        prompt = torch.tensor([[3, 4, 5, 6]])
        model.generate(prompt, max_new_tokens=2, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("kind", [SLOW["fp4"], "nested", SLOW["8bit"]])
def test_evaluation_and_generation_between_steps_change_nothing(tmp_path, base, kind):
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "max_steps": 4}
    more = {"eval_dataset": token_pairs(2, seed=5), "callbacks": [LooksBetweenSteps()]}
    quiet, _ = run(tmp_path / "quiet", load(base, kind), max_steps=4)
    looked, trainer = run(tmp_path / "looked", load(base, kind), **options, arguments=more)
    assert looked == quiet  # to the bit
    logs = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert logs[0]["eval_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert len({log["eval_loss"] for log in logs}) == 5


@pytest.mark.skipif(not repacks_on_this_machine(), reason="this CPU has no AVX512-BF16")
def test_a_model_that_ran_in_eval_mode_before_is_refused(tmp_path, base):
    model = load(base, "nf4").eval()
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5]]))
    with pytest.raises(ModelError, match=r"repacked this 4-bit weight .*Load the model again"):
        make_trainer(tmp_path, model, peft_config=adapter())
    with pytest.raises(ModelError, match="repacked this 4-bit weight"):
        make_trainer(tmp_path, load(base, "nf4"), peft_config=adapter(), ref_model=model)


@pytest.mark.parametrize("kind", ["nested", SLOW["8bit"]])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path, base, kind):
    whole, _ = run(tmp_path / "whole", load(base, kind), optim="adamw_8bit", max_steps=5)
    options = {"save_strategy": "steps", "save_steps": 3, "optim": "adamw_8bit"}
    run(tmp_path / "parts", load(base, kind), **{**options, "max_steps": 3})
    arguments = {"options": {**options, "max_steps": 5}, "peft_config": adapter()}
    trainer = make_trainer(tmp_path / "parts", load(base, kind), **arguments)
    trainer.train(resume_from_checkpoint=True)
    assert history(trainer) == whole


def ways(base):
    """All ways to ask for a 4-bit model."""
    config = BitsAndBytesConfig(**KINDS["nf4"])
    return {
        "argument": (str(base), {}, {"quantization_config": config}),
        "options as JSON": (str(base), json.dumps({"quantization_config": KINDS["nf4"]}), {}),
        "object": (load(base, "nf4"), None, {}),
        "adapter": (load(base, "nf4"), None, {"peft_config": None}),
    }


def test_all_ways_to_ask_for_4_bits_train_alike(tmp_path, base):
    found = {}
    for name, (model, init, arguments) in ways(base).items():
        if name == "adapter":
            torch.manual_seed(3)  # the trainer's seed, with which it would make the adapter
            model = peft.get_peft_model(model, adapter())
        steps, trainer = run(
            tmp_path, model, model_init_kwargs=init, arguments=arguments, max_steps=2
        )
        found[name] = steps, trainer.reference.identity.digest
        assert trainer.reference.store.reports["train"].rows_scored == (name == "argument") * 20
    assert {digest for _, digest in found.values()} == {found["argument"][1]}
    assert [steps for steps, _ in found.values()] == [found["argument"][0]] * len(found)


@pytest.mark.slow  # two runs
def test_the_adapter_of_a_run_loads_over_the_same_base(tmp_path, base):
    steps, trainer = run(tmp_path, load(base, "nf4"), max_steps=5)
    trainer.save_model(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(
        load(base, "nf4"), tmp_path / "adapter", is_trainable=True
    )
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(loaded.train()(ids).logits, trainer.model.train()(ids).logits)
    further = make_trainer(tmp_path / "further", loaded, ref_model=load(base, "nf4"))
    losses = train(further)
    assert losses[0][0] < 0.69 < steps[0][0]  # it begins where the other run ended


@pytest.mark.slow  # a run, and its model loaded three times
def test_a_later_dataset_is_scored_with_the_base_that_is_found_or_loaded_again(tmp_path, base):
    later = token_pairs(3, seed=8)
    given = {"quantization_config": KINDS["nested"]}
    _, trainer = run(tmp_path, str(base), arguments=given, max_steps=2)
    here = trainer.evaluate(later)["eval_logratios/chosen"]
    resumed = make_trainer(tmp_path / "again", load(base, "nested"), later, peft_config=adapter())
    resumed.score_datasets()
    again = resumed.train_set().ref_logps
    np.testing.assert_allclose(trainer.data.datasets[-1].ref_logps, again, rtol=1e-12)
    assert here != 0.0


def refusals(base):
    bits = {"quantization_config": BitsAndBytesConfig(**KINDS["nf4"])}
    full = {"peft_config": None}
    return [
        (str(base), bits | full, None, ModelError, "an optimizer can't update quantised weights"),
        (load(base, "8bit"), full, None, ModelError, "train an adapter"),
        (load(base, "nf4"), bits, None, ConfigError, "the model is loaded already"),
        (str(base), bits, {"quantization_config": KINDS["fp4"]}, ConfigError, "in one place"),
    ]


@pytest.mark.parametrize("number", range(4))
def test_what_cannot_be_trained_is_refused_with_the_reason(tmp_path, base, number):
    model, arguments, init, error, message = refusals(base)[number]
    with pytest.raises(error, match=message):
        run(tmp_path, model, model_init_kwargs=init, arguments=arguments)


@pytest.mark.parametrize(
    "options", [{"init_lora_weights": "pissa"}, {"modules_to_save": ["down_proj"]}]
)
def test_what_peft_cannot_make_is_refused_in_one_sentence(tmp_path, base, options):
    with pytest.raises(ConfigError, match=r"^peft_config: peft can't make this adapter: "):
        make_trainer(tmp_path, load(base, "nf4"), peft_config=adapter(**options))


def test_a_quantised_head_is_refused(tmp_path, base):
    model = load(base, "8bit", llm_int8_skip_modules=["none"])
    with pytest.raises(ModelError, match=r"Linear8bitLt.* and not quantised"):
        make_trainer(tmp_path, model, peft_config=adapter())


def test_an_adapter_in_half_precision_stays_what_it_is(tmp_path, base):
    model = peft.get_peft_model(load(base, "nf4"), adapter())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    _, trainer = run(tmp_path, model, arguments={"peft_config": None}, max_steps=1)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}


def test_4_bit_layers_may_compute_in_another_dtype_than_the_rest(tmp_path, base):
    """The start-up checks then allow for the coarser one."""
    kinds = {"bnb_4bit_compute_dtype": torch.bfloat16, "bnb_4bit_quant_storage": torch.bfloat16}
    steps, _ = run(tmp_path, load(base, "nf4", **kinds), gradient_checkpointing=True, max_steps=3)
    expected, _ = run(tmp_path / "32", load(base, "nf4"), max_steps=3)
    np.testing.assert_allclose(steps, expected, rtol=0.02)
    assert steps != expected


def test_the_argument_does_not_change_the_options_that_were_given(base):
    config = DPOConfig("unused", use_cpu=True, model_init_kwargs={"dtype": "bfloat16"})
    added = with_quantisation(config, BitsAndBytesConfig(**KINDS["nf4"]), str(base))
    assert config.model_init_kwargs == {"dtype": "bfloat16"}
    assert with_quantisation(config, None, str(base)) is config
    options = json.loads(json.dumps(added.model_init_kwargs))  # a checkpoint holds them
    assert options["quantization_config"].items() >= KINDS["nf4"].items()
    assert with_quantisation(added, BitsAndBytesConfig(**KINDS["nf4"]), str(base)) is not added
