"""Scripts written for TRL, recent or years old, work after only their imports are changed."""

from __future__ import annotations

import copy
import math

import pytest
from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments

from dpofast import DPOConfig, DPOTrainer
from dpofast.errors import ConfigError, DPOFastError
from tests.support import byte_tokenizer, tiny_llama

CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}</s>"
CHAT += "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"

TEXT = [
    {"prompt": "2+2=", "chosen": "4", "rejected": "five"},
    {"prompt": "3+1=", "chosen": "4", "rejected": "three"},
]
RENDERED = [
    {
        "prompt": f"<|user|>\n{row['prompt']}</s>\n<|assistant|>\n",
        "chosen": f"{row['chosen']}</s>\n",
        "rejected": f"{row['rejected']}</s>\n",
    }
    for row in TEXT
]
IMPLICIT = [
    {
        side: [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row[side]},
        ]
        for side in ("chosen", "rejected")
    }
    for row in TEXT
]


def options(folder):
    return {
        "output_dir": str(folder / "run"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
    }


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))


@pytest.fixture
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture
def model_folder(tmp_path, tokenizer):
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def first_loss(trainer):
    trainer.train()
    return trainer.first_loss


def test_a_model_by_its_folder_finds_its_tokenizer(tmp_path, model_folder):
    trainer = DPOTrainer(
        model=model_folder,
        args=DPOConfig(**options(tmp_path)),
        train_dataset=Dataset.from_list(TEXT),
    )
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("rows", [TEXT, RENDERED, IMPLICIT], ids=["text", "rendered", "implicit"])
def test_text_rendered_templates_and_implicit_prompts(tmp_path, tokenizer, rows):
    trainer = DPOTrainer(
        model=tiny_llama(),
        args=DPOConfig(**options(tmp_path)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-5)


def test_the_reference_may_be_positional_none_or_named(tmp_path, tokenizer):
    config = DPOConfig(**options(tmp_path))
    model, data = tiny_llama(), Dataset.from_list(TEXT)
    for reference in (None, copy.deepcopy(model)):
        trainer = DPOTrainer(
            copy.deepcopy(model), reference, config, train_dataset=data, tokenizer=tokenizer
        )
        assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-5)
    with pytest.raises(ConfigError, match="itself"):
        DPOTrainer(model, model, config, train_dataset=data, tokenizer=tokenizer)


def test_the_old_style_with_plain_training_arguments(tmp_path, tokenizer):
    trainer = DPOTrainer(
        tiny_llama(),
        None,
        args=TrainingArguments(**options(tmp_path)),
        beta=0.2,
        loss_type="hinge",
        max_length=64,
        train_dataset=Dataset.from_list(TEXT),
        tokenizer=tokenizer,
    )
    assert (trainer.args.beta, trainer.args.max_length) == (0.2, 64)
    assert first_loss(trainer) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("loss_type", ["sigmoid", ["sigmoid"]])
@pytest.mark.parametrize("precompute", [False, True])
def test_loss_type_and_precompute_in_every_form(tmp_path, tokenizer, loss_type, precompute):
    config = DPOConfig(
        **options(tmp_path), loss_type=loss_type, precompute_ref_log_probs=precompute
    )
    data = Dataset.from_list(TEXT)
    trainer = DPOTrainer(tiny_llama(), args=config, train_dataset=data, processing_class=tokenizer)
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("name", ["max_prompt_length", "max_completion_length"])
def test_older_limits_of_lengths_cut_pairs(tmp_path, tokenizer, name):
    part = {"max_prompt_length": "prompt_ids", "max_completion_length": "chosen_ids"}[name]
    for arguments in (
        {"args": DPOConfig(**options(tmp_path), **{name: 1})},
        {"args": TrainingArguments(**options(tmp_path)), name: 1},
    ):
        trainer = DPOTrainer(
            tiny_llama(), train_dataset=Dataset.from_list(TEXT), tokenizer=tokenizer, **arguments
        )
        assert set(map(len, trainer.train_dataset[part])) == {1}


def test_callbacks_are_called(tmp_path, tokenizer):
    seen = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    DPOTrainer(
        tiny_llama(),
        args=DPOConfig(**options(tmp_path)),
        train_dataset=Dataset.from_list(TEXT),
        processing_class=tokenizer,
        callbacks=[Count()],
    ).train()
    assert seen == [1, 2]


def test_train_dataset_in_a_form_that_is_not_preferences_is_named(tmp_path, tokenizer):
    data = Dataset.from_list([{"prompt": "2+2=", "completion": "4", "label": True}])
    with pytest.raises(DPOFastError, match=r"KTO|unpaired"):
        DPOTrainer(
            tiny_llama(),
            args=DPOConfig(**options(tmp_path)),
            train_dataset=data,
            processing_class=tokenizer,
        )
