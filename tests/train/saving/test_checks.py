"""What would keep a trained model from being saved or loaded is found before the first step."""

from __future__ import annotations

import logging
import shutil
from collections import namedtuple

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from dpofast import DPOConfig
from dpofast.errors import ConfigError, ModelError
from dpofast.train.saving.checks import check_saving
from tests.families import tiny_model
from tests.support import (
    byte_tokenizer,
    make_trainer,
    run_config,
    tiny_llama,
    token_pairs,
    train,
)
from tests.trained_families import small_tokenizer

ONE_STEP = {"max_steps": 1}
LORA = peft.LoraConfig(r=2, target_modules=["q_proj"])
Usage = namedtuple("Usage", "total used free")


class NoStep(TrainerCallback):
    """Fails if training begins."""

    def on_train_begin(self, *args, **kwargs):
        raise AssertionError("training has begun")


def refused(trainer, kind, message):
    """The run ends before anything is scored."""
    trainer.add_callback(NoStep())
    with pytest.raises(kind, match=message):
        trainer.train()
    assert not list((trainer.reference.store.folder).glob("**/*.arrow"))


def test_a_generation_config_that_cannot_be_saved(tmp_path):
    model = tiny_llama()
    model.generation_config.temperature = 0.3  # without do_sample
    trainer = make_trainer(tmp_path, model, options=ONE_STEP)
    refused(trainer, ModelError, r"generation_config\.json.*couldn't be saved .*`temperature`")
    model.generation_config.do_sample = True
    train(trainer_that_saves := make_trainer(tmp_path, model, options=ONE_STEP))
    trainer_that_saves.save_model()


def test_a_published_config_with_faults_is_saved_unless_training_changes_it(tmp_path):
    """transformers saves such a config as long as nothing in it was changed."""
    tokenizer = byte_tokenizer()
    model = tiny_llama()
    config = model.generation_config
    config.temperature = 0.3
    config.eos_token_id, config.bos_token_id, config.pad_token_id = [2, 5], 1, 0
    (tmp_path / "published").mkdir()
    config.to_json_file(tmp_path / "published" / "generation_config.json", use_diff=True)
    model.generation_config = type(config).from_pretrained(tmp_path / "published")
    trainer = make_trainer(tmp_path, model, options=ONE_STEP, processing_class=tokenizer)
    train(trainer)
    trainer.save_model()
    model.generation_config = type(config).from_pretrained(tmp_path / "published")
    tokenizer.eos_token = "<s>"  # the Trainer will write it into the config
    trainer = make_trainer(tmp_path / "b", model, options=ONE_STEP, processing_class=tokenizer)
    refused(trainer, ModelError, "couldn't be saved after training: .*`temperature`")


def test_a_generation_config_that_is_missing(tmp_path):
    model = tiny_llama()
    model.generation_config = None
    trainer = make_trainer(tmp_path, model, options=ONE_STEP)
    refused(trainer, ModelError, "^The generation config .* couldn't be saved after training")


def test_a_model_card_that_peft_could_not_read_again(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "README.md").write_text("---\n- a list\n---\n")
    trainer = make_trainer(tmp_path, options=ONE_STEP, peft_config=LORA)
    refused(trainer, ModelError, r"^The model card \(README\.md\) couldn't be saved")


def test_an_adapter_saves_no_generation_config(tmp_path):
    model = tiny_llama()
    model.generation_config.temperature = 0.3
    trainer = make_trainer(tmp_path, model, options=ONE_STEP, peft_config=LORA)
    train(trainer)
    trainer.save_model()


def test_a_model_config_a_tokenizer_and_options_that_cannot_be_saved(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("not\nthis one")

    for owner, what in ((tiny_llama().config, "The config"), (byte_tokenizer(), "The tokenizer")):
        with monkeypatch.context() as patch:
            patch.setattr(type(owner), "save_pretrained", fail)
            trainer = make_trainer(tmp_path, options=ONE_STEP)
            refused(trainer, ModelError, f"^{what} couldn't be saved after training: not this one")
    kwargs = {"gradient_checkpointing_kwargs": {"context_fn": lambda: (None, None)}}
    trainer = make_trainer(tmp_path, options={**ONE_STEP, **kwargs})
    refused(trainer, ConfigError, r"^The options \(training_args\.bin\) couldn't be saved")


def test_weights_that_share_memory_in_part(tmp_path):
    model = tiny_llama()
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    whole = torch.randn(60, 32)
    first.gate_proj.weight = torch.nn.Parameter(whole[:48])
    second.gate_proj.weight = torch.nn.Parameter(whole[12:])
    trainer = make_trainer(tmp_path, model, options=ONE_STEP)
    refused(trainer, ModelError, "The weights couldn't be saved after training: .*shared tensors")


def test_a_model_that_from_pretrained_would_not_build(tmp_path):
    model = tiny_llama()
    model.model.layers = model.model.layers[:1]
    trainer = make_trainer(tmp_path, model, options=ONE_STEP)
    refused(trainer, ModelError, "9 missing .*change the config with it")
    model.config.num_hidden_layers = 1
    train(make_trainer(tmp_path, model, options=ONE_STEP))


def test_tensors_that_loading_would_leave_out_are_a_warning(tmp_path, caplog):
    model = tiny_llama()
    model.value_head = torch.nn.Linear(4, 4)
    train(make_trainer(tmp_path, model, options=ONE_STEP))
    (line,) = [r.message for r in caplog.records if "leave unread" in r.message]
    assert "value_head.bias, value_head.weight" in line


class TestOutputFolder:
    def test_a_file_in_its_place(self, tmp_path):
        (tmp_path / "run").write_text("a file")
        with pytest.raises(ConfigError, match=r"^output_dir: '.*run' can't be made: "):
            make_trainer(tmp_path, options=ONE_STEP)

    def test_a_disk_without_room_for_one_save(self, tmp_path, monkeypatch, caplog):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10, 9, 300_000))
        bytes_of_weights = sum(p.nbytes for p in tiny_llama().parameters())
        assert bytes_of_weights < 300_000 < 3 * bytes_of_weights
        train(make_trainer(tmp_path, options=ONE_STEP))
        saving = {**ONE_STEP, "save_strategy": "steps"}
        with pytest.raises(ConfigError, match=r"a checkpoint of this run takes .* bytes or more"):
            make_trainer(tmp_path, options=saving).train()
        train(make_trainer(tmp_path, options=saving, peft_config=LORA))
        assert "bytes are free" not in caplog.text


class TestPadToken:
    """A pad token that was added to the tokenizer, but has no row in the model."""

    def tokenizer(self):
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        assert tokenizer.pad_token_id == 259
        return tokenizer

    @pytest.mark.parametrize("layout", ["shared", "padded"])
    def test_it_is_refused_for_the_policy(self, tmp_path, layout):
        options = {**ONE_STEP, "layout": layout}
        trainer = make_trainer(tmp_path, options=options, processing_class=self.tokenizer())
        refused(trainer, ModelError, r"'\[PAD\]' has the id 259, .*resize_token_embeddings\(len")

    def test_both_remedies_work(self, tmp_path):
        tokenizer, model = self.tokenizer(), tiny_llama()
        options = {**ONE_STEP, "layout": "padded"}
        with_eos = {**options, "pad_token": "</s>"}
        train(make_trainer(tmp_path, tiny_llama(), options=with_eos, processing_class=tokenizer))
        tokenizer = self.tokenizer()
        model.resize_token_embeddings(len(tokenizer))
        trainer = make_trainer(tmp_path, model, options=options, processing_class=tokenizer)
        train(trainer)
        trainer.save_model(str(tmp_path / "saved"))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)
        assert AutoTokenizer.from_pretrained(tmp_path / "saved").pad_token_id == 259

    def test_padding_is_filled_with_a_token_that_all_models_have(self, tmp_path):
        """An adapter saves no config, and evaluation saves nothing, so both may run."""
        options = {**ONE_STEP, "layout": "padded"}
        expected = train(make_trainer(tmp_path / "a", options=options, peft_config=LORA))
        given = {"options": options, "peft_config": LORA, "processing_class": self.tokenizer()}
        trainer = make_trainer(tmp_path / "b", **given)
        assert trainer.layout.pad_token_id == 2
        assert train(trainer) == expected
        trainer = make_trainer(
            tmp_path / "c",
            options=options,
            eval_dataset=token_pairs(4),
            processing_class=self.tokenizer(),
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(0.6931472)

    def test_a_reference_with_fewer_tokens_scores_padded_rows(self, tmp_path):
        rows = [
            {key: [min(token, 250) for token in row[key]] for key in row} for row in token_pairs(6)
        ]
        smaller, policy = tiny_llama(vocab_size=251), tiny_llama(vocab_size=260)
        options = {**ONE_STEP, "layout": "padded"}
        trainer = make_trainer(
            tmp_path,
            policy,
            rows,
            options=options,
            ref_model=smaller,
            processing_class=self.tokenizer(),
        )
        assert trainer.layout.pad_token_id == 2
        train(trainer)


class TestAfterSaving:
    """The files are compared as well, as a callback or a save of one's own can change names."""

    def spoil(self, trainer, monkeypatch):
        save = type(trainer.model).save_pretrained

        def spoilt(model, folder, *args, **kwargs):
            save(model, folder, *args, **kwargs)
            file = f"{folder}/model.safetensors"
            named = {f"wrapped.{name}": tensor for name, tensor in load_file(file).items()}
            save_file(named, file, metadata={"format": "pt"})

        monkeypatch.setattr(type(trainer.model), "save_pretrained", spoilt)

    def test_wrong_names_are_an_error_and_the_files_stay(self, tmp_path, monkeypatch):
        trainer = make_trainer(tmp_path, options=ONE_STEP)
        train(trainer)
        self.spoil(trainer, monkeypatch)
        with pytest.raises(ModelError, match=r"saved: the saved tensors .* 21 missing .* kept"):
            trainer.save_model(str(tmp_path / "saved"))
        assert len(load_file(tmp_path / "saved" / "model.safetensors")) == 21

    def test_in_a_checkpoint_they_are_logged_and_training_goes_on(
        self, tmp_path, monkeypatch, caplog
    ):
        options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        trainer = make_trainer(tmp_path, options=options)
        self.spoil(trainer, monkeypatch)
        assert len(train(trainer)) == 2
        errors = [r.message for r in caplog.records if r.levelno == logging.ERROR]
        assert ["checkpoint-1" in errors[0], "checkpoint-2" in errors[1]] == [True, True]
        assert (tmp_path / "run" / "checkpoint-2" / "optimizer.pt").is_file()


def test_what_loading_does_to_a_pad_token_is_said_and_refused_for_an_eos_token(tmp_path, caplog):
    model, tokenizer = tiny_model("youtu"), small_tokenizer()
    config = run_config(tmp_path, DPOConfig, None)
    check_saving(model, tokenizer, config)
    assert "will set the embedding of the pad token to 0 when it loads" in caplog.text
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ModelError, match="pad token is its eos_token '</s>', with which answers"):
        check_saving(model, tokenizer, config)
