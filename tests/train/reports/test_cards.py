"""Every saved model has a card that the hub can read and that tells nothing about the computer."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM, Trainer

from dpofast import DPOTrainer
from dpofast.errors import ConfigError
from dpofast.monitor.card import CARD_FILE
from tests.support import byte_tokenizer, make_trainer, tiny_llama, token_pairs

ONE_STEP = {"max_steps": 1}


def lora():
    modules = ["q_proj", "k_proj"]
    return peft.LoraConfig(r=2, target_modules=modules, use_rslora=True, task_type="CAUSAL_LM")


def card_in(folder):
    return ModelCard.load(folder / CARD_FILE)


@pytest.fixture
def drawn(monkeypatch):
    """A plot that takes no time."""
    monkeypatch.setattr(
        "dpofast.train.reports.reports_run.plot_run",
        lambda logs, path, title: path.write_bytes(b"a plot"),
    )


@pytest.fixture
def hub(monkeypatch):
    """What would have been sent to the hub."""
    calls = []

    def create_repo(self, repo_id, **options):
        calls.append(("create", repo_id, options["private"]))
        return SimpleNamespace(repo_id=f"me/{repo_id.split('/')[-1]}")

    def upload_folder(self, *, repo_id, folder_path, commit_message, **options):
        folder = Path(folder_path)
        card = card_in(folder)
        calls.append(("upload", repo_id, commit_message, card.data.to_dict(), options["revision"]))
        return SimpleNamespace(done=lambda: True)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return calls


def test_no_card_tells_where_or_by_whom_it_was_made(tmp_path, monkeypatch, drawn):
    for name in ("USER", "LOGNAME"):
        monkeypatch.setenv(name, "quux")
    for name in ("platform.node", "socket.gethostname"):
        monkeypatch.setattr(name, lambda: "bighost")
    home = tmp_path / "MARKER" / "quux"
    tiny_llama().save_pretrained(home / "model")
    tiny_llama(seed=1).save_pretrained(home / "reference")
    byte_tokenizer().save_pretrained(home / "model")
    pairs = token_pairs(6)
    pairs.to_json(home / "pairs.jsonl")
    options = {
        "max_steps": 1,
        "output_dir": str(home / "run-of-quux"),
        "reference_store": str(home / "store"),
        "run_name": str(home),
        "hub_token": "hf_MARKER",
        "resume_from_checkpoint": str(home / "checkpoint"),
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_quux_loss",
    }
    trainer = make_trainer(
        home,
        str(home / "model"),
        str(home / "pairs.jsonl"),
        options=options,
        processing_class=None,
        eval_dataset={"quux": str(home / "pairs.jsonl"), "other": token_pairs(2)},
        ref_model=str(home / "reference"),
        peft_config=lora(),  # whose own card would name the base's folder
    )
    trainer.train()
    trainer.save_model()
    trainer.save_model(str(home / "saved"))
    trainer.create_model_card(
        model_name=str(home / "final"),
        dataset_name=[str(home / "pairs.jsonl")],
        finetuned_from=str(home / "model"),
    )
    cards = list(home.glob(f"**/{CARD_FILE}"))
    assert len(cards) == 3  # a checkpoint, and two folders of the final model
    for card in cards:
        text = card.read_text()
        secrets = ("MARKER", "quux", "bighost", str(tmp_path))
        assert not [line for line in text.splitlines() if any(s in line for s in secrets)]
        assert "| `pairs.jsonl` | training | 6 |" in text
        assert "evaluation on a set (step" in text
        assert card_in(card.parent).data.base_model is None


def test_an_adapter_has_our_card_in_place_of_that_of_peft(tmp_path):
    model = tiny_llama()
    model.config._name_or_path = "org/base"
    trainer = make_trainer(tmp_path, model, options=ONE_STEP, peft_config=lora())
    for _ in range(2):  # peft changes a card that is there
        trainer.save_model()
    card = card_in(tmp_path / "run")
    assert card.data.library_name == "peft"
    assert (card.data.base_model, card.data.base_model_relation) == ("org/base", "adapter")
    assert card.data.tags == ["generated_from_trainer", "dpofast", "dpo", "lora"]
    assert "[More Information Needed]" not in card.text
    assert "| rank r | 2 |" in card.text
    assert "| target_modules | k_proj, q_proj |" in card.text
    assert "| use_rslora | True |" in card.text
    assert "use_dora" not in card.text


OWN = b"---\r\nlicense: mit\r\n---\r\n\r\n# My own words\r\n"


@pytest.mark.parametrize("own", [OWN, b""], ids=["text", "empty"])
def test_a_card_of_the_user_is_kept_to_the_byte(tmp_path, caplog, own):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CARD_FILE).write_bytes(own)
    trainer = make_trainer(tmp_path, options=ONE_STEP, peft_config=lora())
    trainer.save_model()  # peft changes the card
    trainer.create_model_card()
    assert (tmp_path / "run" / CARD_FILE).read_bytes() == own
    (line,) = [r.getMessage() for r in caplog.records if r.name == "dpofast.train.reports.cards"]
    assert line.startswith(f"{tmp_path / 'run' / CARD_FILE} is kept, because dpofast didn't write")
    trainer.save_model(str(tmp_path / "other"))
    assert "# run" in card_in(tmp_path / "other").text


def test_what_is_known_of_the_run_is_in_its_card(tmp_path, drawn):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / CARD_FILE).write_text("---\nlicense: apache-2.0\n---\n")
    model = tiny_llama()
    model.config._name_or_path = str(tmp_path / "base")
    model.add_model_tags("mine")
    pairs = token_pairs(10)
    pairs.info.download_checksums = {"hf://datasets/org/pairs@0a1b/train.parquet": None}
    trainer = make_trainer(
        tmp_path,
        model,
        pairs,
        options={"max_steps": 3, "logging_steps": 2, "label_smoothing": 0.1, "warmup_ratio": 0.1},
        ref_model=tiny_llama(),
        eval_dataset=token_pairs(4, seed=4),
    )
    trainer.train()
    accuracy = trainer.evaluate()["eval_rewards/accuracies"]
    trainer.save_model(str(tmp_path / "saved"))
    card = card_in(tmp_path / "saved")
    assert (tmp_path / "saved" / "training.png").read_bytes() == b"a plot"
    assert card.data.license == "apache-2.0"
    assert card.data.datasets == ["org/pairs"]
    assert card.data.tags == ["generated_from_trainer", "mine", "dpofast", "dpo"]
    assert card.data.eval_results[0].metric_value == round(accuracy, 6)
    for text in (
        "](training.png)",
        "- Reference: a separate model",
        "| training, first log (step 2) | training, last log (step 3) | evaluation (step 3) |",
        "| reward accuracy |",
        "| [org/pairs](https://huggingface.co/datasets/org/pairs) | training | 10 |",
        "| `local data` | evaluation | 4 |",
        "| beta | 0.5 |",
        "| label_smoothing | 0.1 |",
        "| warmup_ratio | 0.1 |",
        "| pairs per step | 4 |",
        "| steps | 3 |",
        "| precision | trained weights in float32 |",
    ):
        assert text in card.text


def test_an_optimizer_of_the_user_is_the_one_that_is_named(tmp_path):
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    trainer = make_trainer(tmp_path, model, optimizers=(optimizer, schedule))
    trainer.create_model_card()
    text = card_in(tmp_path / "run").text
    assert "| optim | SGD |\n" in text
    assert "| lr_scheduler_type | StepLR |\n" in text
    assert "learning_rate" not in text


def test_an_older_run_leaves_no_plot_in_the_card(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "training.png").write_bytes(b"of an older run")
    trainer = make_trainer(tmp_path, options=ONE_STEP)
    trainer.save_model()
    assert "training.png" not in card_in(tmp_path / "run").text


def test_the_arguments_of_trl_and_of_transformers(tmp_path):
    trainer = make_trainer(tmp_path, options=ONE_STEP)
    own = inspect.signature(DPOTrainer.create_model_card).parameters
    others = [Trainer.create_model_card]
    trl = pytest.importorskip("trl")
    others.append(trl.DPOTrainer.create_model_card)
    assert {name for other in others for name in inspect.signature(other).parameters} <= set(own)
    trainer.create_model_card("a name", "org/pairs", "a tag")
    card = card_in(tmp_path / "run")
    assert card.text.lstrip().splitlines()[2] == "# a name"
    assert (card.data.datasets, card.data.tags[-1]) == (["org/pairs"], "a tag")
    trainer.create_model_card(
        language="de",
        license="mit",
        tags=["one", "two"],
        finetuned_from="org/base",
        tasks="text-generation",
        dataset_tags=["org/pairs"],
        dataset="Pairs",
        dataset_args="en",
    )
    trainer.save_model()  # what was given before stays
    card = card_in(tmp_path / "run")
    assert "# a name\n" in card.text
    assert "[org/pairs](https://huggingface.co/datasets/org/pairs) (en)" in card.text
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "datasets": ["org/pairs"],
        "language": ["de"],
        "library_name": "transformers",
        "license": "mit",
        "model_name": "a name",
        "pipeline_tag": "text-generation",
        "tags": ["generated_from_trainer", "dpofast", "dpo", "one", "two"],
    }


def test_a_card_that_cannot_be_made_ends_no_run(tmp_path, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no card")

    options = {**ONE_STEP, "save_strategy": "steps", "save_steps": 1}
    monkeypatch.setattr("dpofast.train.reports.cards.model_card", broken)
    trainer = make_trainer(tmp_path, options=options, peft_config=lora())
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / "run" / CARD_FILE).exists()
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    monkeypatch.undo()
    monkeypatch.setattr("dpofast.train.reports.card_facts.card_options", broken)
    trainer.save_model()
    assert "| option | value |" in card_in(tmp_path / "run").text
    lines = [r.getMessage() for r in caplog.records if r.name == "dpofast.monitor.guard"]
    assert lines == [
        "README.md failed (RuntimeError: no card); the run goes on without.",
        "README.md: its part 'options' failed (RuntimeError: no card); the run goes on without.",
    ]


def loss_of_quux(chosen, rejected, lengths):
    return (rejected - chosen).exp()


def test_the_name_of_a_loss_may_not_tell_who_wrote_it(tmp_path, monkeypatch):
    monkeypatch.setenv("LOGNAME", "quux")
    make_trainer(tmp_path, options=ONE_STEP, loss_fn=loss_of_quux).create_model_card()
    assert "| loss_fn | a function |" in card_in(tmp_path / "run").text


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"model_name": 5}, "model_name: got 5, expected a string."),
        ({"dataset_name": {"a": 1}}, "dataset_name: got {'a': 1}, expected a string or a list of"),
        ({"license": "My own"}, "license: got 'My own', expected an id that the hub knows"),
    ],
)
def test_what_a_card_cannot_have_is_refused_before_anything_is_saved(
    tmp_path, hub, given, sentence
):
    trainer = make_trainer(tmp_path, options=ONE_STEP)
    for call in (trainer.create_model_card, trainer.push_to_hub):
        with pytest.raises(ConfigError) as caught:
            call(**given)
        assert str(caught.value).startswith(f"create_model_card: {sentence}")
    assert not hub
    assert not list((tmp_path / "run").iterdir())


class TestHub:
    def test_a_push_saves_and_uploads_with_a_card(self, tmp_path, hub):
        trainer = make_trainer(tmp_path, options={**ONE_STEP, "hub_model_id": "tuned"})
        tags = ["a tag"]
        trainer.push_to_hub(
            "Done", token="t", revision="dev", private=True, dataset_name="me/pairs", tags=tags
        )
        assert tags == ["a tag"]
        created, (*uploaded, data, revision) = hub
        assert created == ("create", "tuned", True)
        assert uploaded == ["upload", "me/tuned", "Done"]
        assert revision == "dev"
        assert (data["model_name"], data["datasets"]) == ("tuned", ["me/pairs"])
        assert data["tags"] == ["generated_from_trainer", "dpofast", "dpo", "a tag"]
        AutoModelForCausalLM.from_pretrained(tmp_path / "run")
        assert 'model = "me/tuned"' in card_in(tmp_path / "run").text
        assert trainer.args.hub_private_repo is None
        trainer.push_to_hub(tags=None, model_name="again")
        assert hub[-1][3]["model_name"] == "again"

    def test_a_push_keeps_what_was_given_before(self, tmp_path, hub):
        trainer = make_trainer(tmp_path, options=ONE_STEP)
        trainer.create_model_card("a name", "me/pairs", "a tag")
        trainer.push_to_hub(license="mit")
        data = hub[-1][3]
        assert (data["model_name"], data["datasets"]) == ("a name", ["me/pairs"])
        assert (data["license"], data["tags"][-1]) == ("mit", "a tag")

    def test_a_folder_with_the_name_of_the_user_is_no_title(self, tmp_path, monkeypatch, hub):
        monkeypatch.setenv("LOGNAME", "run")
        make_trainer(tmp_path, options=ONE_STEP).push_to_hub()
        assert "# llama-DPO\n" in (tmp_path / "run" / CARD_FILE).read_text()

    def test_checkpoints_are_pushed_with_a_card(self, tmp_path, hub):
        options = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 1, **ONE_STEP}
        make_trainer(tmp_path, options=options).train()
        (created, (*uploaded, _, _)) = hub
        assert created == ("create", "run", None)
        assert uploaded == ["upload", "me/run", "Training in progress, step 1"]

    def test_a_hub_out_of_reach_is_found_before_anything_is_scored(self, tmp_path):
        options = {"push_to_hub": True, "hub_model_id": "me/tuned"}
        with pytest.raises(ConfigError, match=r"^push_to_hub: the repository 'me/tuned' can't be"):
            make_trainer(tmp_path, options=options)
        assert not (tmp_path / "store").exists()

    def test_a_push_that_fails_leaves_the_model_saved(self, tmp_path):
        trainer = make_trainer(tmp_path, options=ONE_STEP)
        with pytest.raises(ConfigError, match=r"hf auth login.*The model is saved in output_dir"):
            trainer.push_to_hub()
        AutoModelForCausalLM.from_pretrained(tmp_path / "run")


def test_the_model_has_the_tags(tmp_path):
    assert make_trainer(tmp_path).model.model_tags == ["dpofast", "dpo"]
    assert make_trainer(tmp_path, peft_config=lora()).model.model_tags == ["dpofast", "dpo"]
    assert tiny_llama().model_tags is None


def test_a_mixture_names_its_datasets(tmp_path):
    from dpofast.data import mix_preferences

    rows = [{"prompt": "a", "chosen": f" {i}", "rejected": " no"} for i in range(3)]
    sets = {"org/one": Dataset.from_list(rows), "/home/me/two.jsonl": Dataset.from_list(rows[:2])}
    trainer = make_trainer(tmp_path, pairs=mix_preferences(sets), options=ONE_STEP)
    trainer.dataset_names = list(sets)
    trainer.create_model_card()
    card = card_in(tmp_path / "run")
    assert card.data.datasets == ["org/one"]
    assert "| `two.jsonl` | training | 2 |" in card.text


def test_a_dataset_that_was_exchanged_is_not_prepared_for_the_card(tmp_path):
    trainer = make_trainer(tmp_path, options=ONE_STEP)
    trainer.train_dataset = trainer.eval_dataset = token_pairs(3, seed=9)
    trainer.create_model_card()
    assert "| `local data` | training |  |" in card_in(tmp_path / "run").text
    assert len(trainer.data.datasets) == 1  # other ranks would have to prepare it, too


def test_the_figures_are_those_of_the_weights_that_were_loaded_at_the_end(tmp_path):
    options = {
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "save_only_model": True,
    }
    # These pairs are random, and get worse from the first step on.
    trainer = make_trainer(tmp_path, options=options, eval_dataset=token_pairs(2, seed=4))
    trainer.train()
    trainer.save_model()
    text = card_in(tmp_path / "run").text
    assert "- Weights: those of step 1 of 2, the best by eval_loss\n" in text
    assert "| metric | training, last log (step 1) | evaluation (step 1) |" in text
    assert "training, last log (step 2)" in card_in(tmp_path / "run" / "checkpoint-2").text
