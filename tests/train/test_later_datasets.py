"""Datasets that a run first sees after its training began are scored with the same reference."""

from __future__ import annotations

import gc
import shutil
import weakref

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from dpofast.errors import ReferenceStoreError
from dpofast.model.checks import check_model
from tests.support import byte_tokenizer, history, make_trainer, tiny_llama, token_pairs, train

LATER = token_pairs(4, seed=77)
SAVING = {"save_strategy": "steps", "save_steps": 2}


def later_logps(trainer):
    """[n, 2] reference log-probs of the dataset that was evaluated last."""
    return trainer.data.datasets[-1].ref_logps


def logps_before(folder, model, **arguments):
    """[n, 2] reference log-probs of LATER, scored before the training."""
    trainer = make_trainer(folder / "before", model, eval_dataset=LATER, **arguments)
    trainer.score_datasets()
    return later_logps(trainer)


@pytest.fixture
def folder(tmp_path):
    """The folder of a model that runs load by name."""
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


def lora(**options):
    peft = pytest.importorskip("peft", reason="needs the extra `peft`")
    return peft.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "r": 4, **options})


ADAPTERS = {
    "attention": {},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "whole embedding": {"modules_to_save": ["embed_tokens"]},
    "dropout": {"lora_dropout": 0.3},
    "rank-stabilised": {"use_rslora": True},
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.slow
def test_with_a_fresh_adapter_the_model_below_it_is_the_reference(tmp_path, name, caplog):
    caplog.set_level("INFO", logger="dpofast")
    adapter = lora(**ADAPTERS[name])
    expected = logps_before(tmp_path, tiny_llama(), peft_config=adapter)
    options = {"gradient_checkpointing": name == "attention"}
    trainer = make_trainer(tmp_path, tiny_llama(), peft_config=adapter, options=options)
    trainer.train()
    frozen = next(p for n, p in trainer.model.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    state = [(p.requires_grad, p.detach().clone()) for p in trainer.model.parameters()]
    modes = [module.training for module in trainer.model.modules()]
    metrics = trainer.evaluate(LATER)
    np.testing.assert_array_equal(later_logps(trainer), expected)
    assert "The reference is the model below the adapter." in caplog.messages
    assert metrics["eval_logratios/chosen"] != pytest.approx(0, abs=1e-3), "the adapter is back"
    assert [module.training for module in trainer.model.modules()] == modes
    for parameter, (trained, value) in zip(trainer.model.parameters(), state, strict=True):
        assert parameter.requires_grad == trained
        assert torch.equal(parameter, value)


OTHER_ADAPTERS = {
    "biases of the base": lambda peft: lora(bias="all"),
    "rows of the embedding": lambda peft: lora(trainable_token_indices=[5, 7, 9]),
    "not fresh": lambda peft: lora(init_lora_weights=False),
    "taken out of the base": lambda peft: lora(init_lora_weights="olora"),
    "dora": lambda peft: lora(use_dora=True, modules_to_save=["lm_head"]),
    "loha": lambda peft: peft.LoHaConfig(target_modules=["q_proj"], r=4),
    "lokr": lambda peft: peft.LoKrConfig(target_modules=["q_proj"], r=4),
    "oft": lambda peft: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8),
    "ia3": lambda peft: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "vera": lambda peft: peft.VeraConfig(target_modules=["q_proj"], r=4),
}


# The others take the same way, and seconds together.
FAST_ADAPTERS = ("biases of the base", "rows of the embedding", "taken out of the base", "dora")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FAST_ADAPTERS else pytest.mark.slow)
        for name in OTHER_ADAPTERS
    ],
)
def test_any_other_adapter_gets_back_what_it_began_with(tmp_path, name):
    peft = pytest.importorskip("peft", reason="needs the extra `peft`")
    adapter = OTHER_ADAPTERS[name](peft)
    base = {"attention_bias": name == "biases of the base"}
    expected = logps_before(tmp_path, tiny_llama(**base), peft_config=adapter)
    options = {"learning_rate": 0.3}  # some kinds hardly move the log-probs
    trainer = make_trainer(tmp_path, tiny_llama(**base), peft_config=adapter, options=options)
    trainer.train()
    state = [p.detach().clone() for p in trainer.model.parameters()]
    metrics = trainer.evaluate(LATER)
    np.testing.assert_array_equal(later_logps(trainer), expected)
    assert metrics["eval_logratios/chosen"] != pytest.approx(0, abs=1e-5)
    for parameter, value in zip(trainer.model.parameters(), state, strict=True):
        assert torch.equal(parameter, value)


def test_an_adapter_that_was_trained_before_gets_back_what_it_began_with(tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra `peft`")
    model = peft.get_peft_model(tiny_llama(), lora(init_lora_weights=False))
    model.save_pretrained(tmp_path / "trained")

    def policy():
        first = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "trained")
        first.add_adapter("second", lora())
        first.base_model.set_adapter(["default", "second"])
        return first

    expected = logps_before(tmp_path, policy())
    trainer = make_trainer(tmp_path, policy())
    trainer.train()
    trainer.evaluate(LATER)
    np.testing.assert_array_equal(later_logps(trainer), expected)


def test_a_model_below_an_adapter_that_was_changed_is_not_the_reference(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=lora())
    trainer.train()
    with torch.no_grad():
        trainer.model.get_base_model().model.norm.weight.mul_(2)
    with pytest.raises(ReferenceStoreError, match="below its adapter is another model now"):
        trainer.evaluate(LATER)


def test_a_merged_adapter_is_refused_with_the_reason(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=lora())
    trainer.train()
    trainer.model.merge_adapter()
    with pytest.raises(ReferenceStoreError, match=r"its adapter can't be switched off.*unmerge"):
        trainer.evaluate(LATER)


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ("name", "bfloat16"),
        ("model", "float32"),
        pytest.param("name", "float32", marks=pytest.mark.slow),
        pytest.param("model", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_after_full_training_the_reference_is_loaded_again(folder, monkeypatch, given, dtype):
    name = str(folder / "model")
    arguments = {"processing_class": None} if given == "name" else {}
    kwargs = {"dtype": dtype, "attention_dropout": 0.1, "rms_norm_eps": 1e-3}

    def policy():
        return name if given == "name" else AutoModelForCausalLM.from_pretrained(name, **kwargs)

    options = {"model_init_kwargs": kwargs} if given == "name" else {}
    expected = logps_before(folder, policy(), options=options, **arguments)
    checked = []
    monkeypatch.setattr(
        "dpofast.train.reference.run_reference.check_model",
        lambda model, *rest: checked.append(weakref.ref(model)) or check_model(model, *rest),
    )
    trainer = make_trainer(folder, policy(), options=options, **arguments)
    losses = train(trainer)
    trainer.evaluate(LATER)
    assert expected.std() > 1
    np.testing.assert_array_equal(later_logps(trainer), expected)
    assert len(checked) == 2, "the loaded model goes through the checks, too"
    gc.collect()
    assert checked[0]() is trainer.model
    assert checked[1]() is None, "it is freed"
    assert len(losses) == 6


def test_a_model_of_the_hub_is_loaded_again_at_the_same_commit(tmp_path):
    hub = tmp_path / "hub" / "models--someone--tiny"
    commits = {"a" * 40: tiny_llama(), "b" * 40: tiny_llama(seed=9)}
    for commit, model in commits.items():
        model.save_pretrained(hub / "snapshots" / commit)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("a" * 40)
    kwargs = {"cache_dir": str(tmp_path / "hub"), "local_files_only": True}
    expected = logps_before(tmp_path, tiny_llama())
    options = {"model_init_kwargs": kwargs}
    trainer = make_trainer(tmp_path, "someone/tiny", options={**SAVING, **options})
    trainer.train()
    (hub / "refs" / "main").write_text("b" * 40)
    trainer.evaluate(LATER)
    np.testing.assert_array_equal(later_logps(trainer), expected)
    shutil.rmtree(tmp_path / "store")
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    resumed = make_trainer(tmp_path, checkpoint, options=options)
    resumed.train(resume_from_checkpoint=checkpoint)
    resumed.evaluate(LATER)
    np.testing.assert_array_equal(later_logps(resumed), expected)


@pytest.mark.parametrize(
    ("loaded", "cast"),
    [
        (torch.bfloat16, torch.float32),
        pytest.param(torch.float32, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(torch.float32, torch.float32, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_a_model_that_was_cast_after_loading_is_loaded_and_cast_again(folder, loaded, cast):
    def policy():
        return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=loaded).to(cast)

    expected = logps_before(folder, policy())
    trainer = make_trainer(folder, policy(), options={"max_steps": 1})
    trainer.train()
    trainer.evaluate(LATER)
    np.testing.assert_array_equal(later_logps(trainer), expected)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_new_dataset_during_training_changes_no_weight(folder, kind):
    """The weights are those of a run that knew the dataset from the start, random numbers too."""

    class Evaluate(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                self.trainer.evaluate(self.given)

    def trained(name, eval_dataset, given):
        policy = str(folder / "model") if kind == "full" else tiny_llama()
        more = {} if kind == "full" else {"peft_config": lora(lora_dropout=0.2)}
        callback = Evaluate()
        callback.trainer = run = make_trainer(
            folder / name,
            policy,
            options={"disable_dropout": False},
            callbacks=[callback],
            eval_dataset=eval_dataset,
            **more,
        )
        callback.given = given
        run.train()
        return run

    expected = trained("known", LATER, None).model.state_dict()
    run = trained("new", None, LATER)
    assert len(later_logps(run)) == 4
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, expected[name])


def test_predict_and_a_second_training_take_new_datasets(folder):
    trainer = make_trainer(folder, str(folder / "model"))
    trainer.train()
    more = token_pairs(6, seed=5)
    expected = trainer.predict(LATER).metrics["test_loss"]
    trainer.train_dataset = more
    trainer.train()
    assert trainer.train_set().ref_logps is not None
    own = make_trainer(folder / "own", str(folder / "model"), more, eval_dataset=LATER)
    own.score_datasets()
    scored = {len(each): each.ref_logps for each in own.data.datasets}
    np.testing.assert_array_equal(trainer.train_set().ref_logps, scored[6])
    later = next(each for each in trainer.data.datasets if each.name.startswith("test"))
    np.testing.assert_array_equal(later.ref_logps, scored[4])
    assert np.isfinite(expected)


def test_without_a_name_or_the_same_folder_the_reason_is_given(folder):
    trainer = make_trainer(folder)
    trainer.train()
    with pytest.raises(ReferenceStoreError, match=r"wasn't loaded by a name.*ref_model"):
        trainer.evaluate(LATER)
    trainer = make_trainer(folder, str(folder / "model"))
    trainer.train()
    trainer.save_model(str(folder / "model"))  # over the model that it began with
    with pytest.raises(ReferenceStoreError, match=r"is another model now.*weights"):
        trainer.evaluate(LATER)
    shutil.rmtree(folder / "model")
    with pytest.raises(ReferenceStoreError, match=r"loaded again.*does not exist"):
        trainer.evaluate(LATER)
    assert len(trainer.evaluate(trainer.train_dataset)) > 3, "stored log-probs are still read"


def test_a_resumed_run_loads_the_reference_that_its_checkpoint_names(folder):
    expected = train(make_trainer(folder, str(folder / "model"), options=SAVING))
    checkpoint = str(folder / "run" / "checkpoint-4")
    before = logps_before(folder, tiny_llama())
    shutil.rmtree(folder / "store")
    resumed = make_trainer(folder, checkpoint, options=SAVING)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert history(resumed) == expected
    assert resumed.reference.store.totals().rows_scored == 20
    resumed.evaluate(LATER)
    np.testing.assert_array_equal(later_logps(resumed), before)
    # Its own checkpoints name the same model.
    shutil.rmtree(folder / "store")
    again = make_trainer(folder, checkpoint, options={**SAVING, "max_steps": 8})
    again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-6"))
    assert history(again)[:6] == expected


def test_a_run_resumed_with_a_trained_adapter_has_the_model_below_it(tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra `peft`")
    expected = train(make_trainer(tmp_path, peft_config=lora(), options=SAVING))
    checkpoint = str(tmp_path / "run" / "checkpoint-4")
    shutil.rmtree(tmp_path / "store")
    moved = peft.PeftModel.from_pretrained(tiny_llama(), checkpoint, is_trainable=True)
    resumed = make_trainer(tmp_path, moved, options=SAVING)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert history(resumed) == expected
    assert resumed.reference.store.totals().rows_scored == 20


def test_a_run_resumed_with_a_trained_adapter_of_another_kind_is_refused(tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra `peft`")
    make_trainer(tmp_path, peft_config=lora(use_dora=True), options=SAVING).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-4")
    shutil.rmtree(tmp_path / "store")
    moved = peft.PeftModel.from_pretrained(tiny_llama(), checkpoint, is_trainable=True)
    resumed = make_trainer(tmp_path, moved, options=SAVING)
    with pytest.raises(ReferenceStoreError, match="its adapter belongs to the reference"):
        resumed.train(resume_from_checkpoint=checkpoint)
