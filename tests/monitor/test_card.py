"""Model cards: metadata as the hub reads it, tables, and the mark of who wrote them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard

from dpofast.monitor.card import CARD_FILE, CardData, CardFacts, is_kept, model_card
from dpofast.monitor.card_metrics import evaluations, metrics_table

LOGS = [
    {"step": 2, "loss": 0.7, "rewards/accuracies": 0.25, "rewards/margins": -1e-7},
    {"step": 4, "eval_loss": 0.68, "eval_rewards/accuracies": 0.5, "eval_rewards/margins": 0.1},
    {"step": 5, "loss": 0.6, "rewards/accuracies": 0.75, "rewards/margins": 1.5},
    {"step": 5, "eval_loss": 0.5, "eval_rewards/accuracies": 0.875, "eval_rewards/margins": 1.0},
    {"step": 5, "train_loss": 0.65, "train_runtime": 1.0},
]
FACTS = CardFacts(
    model_name="base-DPO",
    architecture="LlamaForCausalLM",
    base_model="org/base",
    hub_model_id="me/base-DPO",
    reference="the policy before its first step",
    datasets=[
        CardData("org/pairs", "org/pairs", pairs=1234, config="en"),
        CardData("more.jsonl", pairs=5),
        CardData("held_out.jsonl", None, "evaluation", 8, set_name="eval"),
    ],
    options={"beta": 0.1, "label_smoothing": None, "a|b": "<lambda>"},
    log_history=LOGS,
    versions={"torch": "2.13.0", "deepspeed": None},
    tags=["dpofast", "dpo", "dpo"],
    languages=["en"],
    license="apache-2.0",
)


def read(facts=FACTS, **more):
    card = ModelCard(model_card(facts, **more))
    return card.data, card.text


def test_held_out_sets_keep_their_own_figures_on_the_hub():
    """huggingface_hub joins results with the same type, configuration and split."""
    logs = [
        {"step": 5, f"eval_{name}_loss": loss, f"eval_{name}_rewards/margins": 1.0}
        for name, loss in (("easy", 0.1), ("hard", 0.6), ("a/same", 0.3), ("b/same", 0.4))
    ]
    hub_set = CardData("org/pairs", "org/pairs", "evaluation", set_name="hard")
    data, _ = read(replace(FACTS, log_history=logs, datasets=[hub_set]))
    (results,) = [entry["results"] for entry in data.to_dict()["model-index"]]
    assert [
        (result["dataset"]["type"], result["dataset"]["split"], result["metrics"][0]["value"])
        for result in results
    ] == [
        ("preference-pairs", "easy", 0.1),
        ("org/pairs", "hard", 0.6),
        ("preference-pairs", "same 3", 0.3),
        ("preference-pairs", "same 4", 0.4),
    ]


def test_the_metadata_are_those_of_the_hub():
    data, _ = read()
    (first, second) = data.eval_results
    assert (first.metric_type, first.metric_value) == ("accuracy", 0.875)
    assert (second.metric_type, second.metric_value) == ("loss", 0.5)
    assert first.dataset_name == second.dataset_name == "held_out.jsonl"
    assert data.model_name == "base-DPO"
    plain = data.to_dict()
    del plain["model-index"]
    assert plain == {
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "datasets": ["org/pairs"],
        "language": ["en"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["generated_from_trainer", "dpofast", "dpo"],
    }


def test_what_is_unknown_is_left_out():
    text = model_card(CardFacts("x", "LlamaForCausalLM"))
    assert yaml.safe_load(text.split("---\n")[1]) == {
        "library_name": "transformers",
        "model_name": "x",
        "pipeline_tag": "text-generation",
        "tags": ["generated_from_trainer"],
    }
    assert "A fine-tuned version of a local model (`LlamaForCausalLM`), trained by [Direct" in text
    assert "None" not in text


def test_an_adapter_is_one_of_peft():
    data, text = read(CardFacts("x", "LlamaForCausalLM", base_model="org/base", adapter="LoRA"))
    assert (data.library_name, data.base_model_relation) == ("peft", "adapter")
    assert "A LoRA adapter for [org/base](https://huggingface.co/org/base)" in text


def test_the_text_names_data_options_and_versions():
    _, text = read(plot="training.png")
    pairs = "[org/pairs](https://huggingface.co/datasets/org/pairs) (en)"
    assert f"trained on {pairs} and `more.jsonl` by" in text
    assert f"| {pairs} | training | 1,234 |" in text
    assert "| `held_out.jsonl` | evaluation | 8 |" in text
    assert "| beta | 0.1 |\n| a/b | &lt;lambda> |\n" in text
    assert "label_smoothing" not in text
    assert "- torch 2.13.0\n" in text
    assert "deepspeed" not in text
    assert 'model = "me/base-DPO"' in text
    assert "](training.png)" in text
    assert "training.png" not in read()[1]


def test_the_table_has_the_first_and_the_last_log_and_the_last_evaluation():
    lines = metrics_table(LOGS).splitlines()
    assert lines[0] == (
        "| metric | training, first log (step 2) | training, last log (step 5) "
        "| evaluation (step 5) |"
    )
    assert lines[2:5] == [
        "| loss | 0.7000 | 0.6000 | 0.5000 |",
        "| reward accuracy | 0.2500 | 0.7500 | 0.8750 |",
        "| reward margin | 0.0000 | 1.5000 | 1.0000 |",
    ]
    assert metrics_table([]) == ""


def test_named_sets_have_columns_of_their_own():
    values = {"loss": 0.5, "aux_loss": 3.0, "rewards/margins": 1.0}
    logs = [
        {"step": 3, **{f"eval_{name}_{key}": value for key, value in values.items()}}
        for name in ("short", "long")
    ]
    expected = {"loss": 0.5, "rewards/margins": 1.0, "step": 3}
    assert evaluations(logs) == {"short": expected, "long": expected}
    assert "evaluation on long (step 3) |" in metrics_table(logs)


@pytest.mark.parametrize("change", ["license: mit\n", "word"])
def test_a_card_that_was_changed_is_kept(tmp_path, change):
    assert not is_kept(tmp_path)
    text = model_card(FACTS)
    (tmp_path / CARD_FILE).write_text(text)
    assert not is_kept(tmp_path)
    changed = text.replace("license: apache-2.0\n", change) if ":" in change else text + change
    (tmp_path / CARD_FILE).write_text(changed)
    assert is_kept(tmp_path)
    (tmp_path / CARD_FILE).write_text("# My model\n")
    assert is_kept(tmp_path)
