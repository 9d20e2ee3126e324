"""KTO on single answers trains as a textbook loop in fp64: z of each whole step first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset

from dpofast import DPOTrainer
from dpofast.data.tokens.mismatched import mismatched_rows
from dpofast.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from dpofast.train import kto
from dpofast.train.steps.answers import mismatched_logratios, with_z
from tests.answers import answer_rows, make_kto
from tests.data.builders import CHAT_TEMPLATE
from tests.support import (
    BETA,
    LEARNING_RATE,
    PlainDPO,
    answer_logps,
    byte_tokenizer,
    clip_exactly,
    float64_throughout,
    history,
    tiny_llama,
    token_pairs,
)

WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.5}


class PlainKTO(PlainDPO):
    """The textbook loop: z from the step's mismatched answers, then one answer at a time."""

    def __init__(self, model, loss_type, weights):
        super().__init__(model, BETA, LEARNING_RATE)
        self.loss_type, self.weights = loss_type, weights
        self.zs = []

    def train(self, rows, *args, **options):
        sources = mismatched_rows(_numbers(rows["prompt_ids"][:]))
        mismatched = [rows[source]["completion_ids"] for source in sources]
        return super().train(rows.add_column("mismatched_ids", mismatched), *args, **options)

    def logratio(self, prompt, answer):
        with torch.no_grad():
            reference = answer_logps(self.reference, prompt, answer)
        return answer_logps(self.model, prompt, answer) - reference

    def z(self, rows):
        if self.loss_type == "apo_zero_unpaired":
            return 0.0
        with torch.no_grad():
            found = [self.logratio(row["prompt_ids"], row["mismatched_ids"]) for row in rows]
        return max(torch.stack(found).mean().item(), 0.0)

    def step(self, rows):
        self.model.train()
        z, total = self.z(rows), 0.0
        self.zs.append(z)
        for row in rows:
            logratio = self.logratio(row["prompt_ids"], row["completion_ids"])
            if row["label"]:
                loss = self.weights[0] * (1 - torch.sigmoid(BETA * (logratio - z)))
            else:
                loss = self.weights[1] * (1 - torch.sigmoid(BETA * (z - logratio)))
            loss = row.get("weight", 1.0) * loss / len(rows)
            loss.backward()
            total += loss.item()
        norm = clip_exactly(self.model.parameters(), self.max_norm).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, norm


def _numbers(prompts):
    known = []
    for prompt in prompts:
        if prompt not in known:
            known.append(prompt)
    return [known.index(prompt) for prompt in prompts]


LAYOUTS = [
    {"layout": "shared"},
    pytest.param({"layout": "unshared"}, marks=pytest.mark.slow),
    pytest.param({"layout": "padded"}, marks=pytest.mark.slow),
    {"max_tokens_per_microbatch": 40},  # several micro-batches of several answers
    {"max_tokens_per_microbatch": 1},  # long answers
]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_float64_training_is_a_textbook_loop(tmp_path, loss_type, options):
    rows = answer_rows()
    with float64_throughout():
        plain = PlainKTO(tiny_llama().double(), loss_type, tuple(WEIGHTS.values()))
        expected = np.asarray(plain.train(rows, 4, 6, seed=3))
        named = {"loss_type": loss_type, **WEIGHTS, **options}
        trainer = make_kto(tmp_path, tiny_llama().double(), rows, options=named)
        trainer.train()
    np.testing.assert_allclose(np.asarray(history(trainer)), expected, rtol=1e-9)
    assert abs(expected[-1, 0] / expected[0, 0] - 1) > 0.01  # it learns
    if loss_type == "kto":
        assert max(plain.zs) > 1e-3  # z isn't clamped in all steps
        logged = [log["kl"] for log in trainer.state.log_history if "grad_norm" in log]
        np.testing.assert_allclose(logged, plain.zs, rtol=1e-9, atol=1e-12)


def test_weights_of_rows_multiply_their_losses(tmp_path):
    rows = answer_rows()
    rows = rows.add_column("weight", [0.5 * (number % 4) for number in range(len(rows))])
    with float64_throughout():
        plain = PlainKTO(tiny_llama().double(), "kto", (1.0, 1.0))
        expected = np.asarray(plain.train(rows, 4, 3, seed=3))
        trainer = make_kto(tmp_path, tiny_llama().double(), rows, options={"max_steps": 3})
        trainer.train()
    np.testing.assert_allclose(np.asarray(history(trainer)), expected, rtol=1e-9)


def test_metrics_are_means_over_the_answers_of_each_label(tmp_path):
    rows = answer_rows()
    with float64_throughout():
        options = {"max_steps": 1, "per_device_train_batch_size": 5, "learning_rate": 1e-2}
        options |= {"per_device_eval_batch_size": len(rows)}
        trainer = make_kto(
            tmp_path, tiny_llama().double(), rows, options=options, eval_dataset=answer_rows()
        )
        trainer.train()
        found = trainer.evaluate()
        plain = PlainKTO(tiny_llama().double(), "kto", (1.0, 1.0))
        plain.model, model = trainer.model, plain.model
        plain.reference = model
        logratios = torch.stack(
            [plain.logratio(row["prompt_ids"], row["completion_ids"]) for row in rows]
        )
        sources = mismatched_rows(_numbers(rows["prompt_ids"][:]))
        mismatched = [
            {**rows[i], "mismatched_ids": rows[s]["completion_ids"]} for i, s in enumerate(sources)
        ]
        z = plain.z(mismatched)
    labels = torch.tensor(rows["label"][:])
    rewards = (BETA * logratios).detach()
    chosen, rejected = rewards[labels].mean().item(), rewards[~labels].mean().item()
    signed = torch.where(labels, logratios.detach() - z, z - logratios.detach())
    assert found["eval_kl"] == pytest.approx(z, rel=1e-9)
    assert found["eval_loss"] == pytest.approx(
        torch.sigmoid(-BETA * signed).mean().item(), rel=1e-9
    )
    assert found["eval_rewards/chosen"] == pytest.approx(chosen, rel=1e-8)
    assert found["eval_rewards/rejected"] == pytest.approx(rejected, rel=1e-8)
    assert found["eval_rewards/margins"] == pytest.approx(chosen - rejected, rel=1e-8)
    assert "eval_rewards/accuracies" not in found


def test_a_resumed_run_is_the_same_run(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = make_kto(tmp_path / "whole", options=options)
    whole.train()
    first = make_kto(tmp_path / "parts", options=options)
    first.train()
    again = make_kto(tmp_path / "parts", options=options)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "run" / "checkpoint-2"))
    assert history(again) == history(whole)
    other = make_kto(tmp_path / "parts", options={**options, "desirable_weight": 2.0})
    with pytest.raises(CheckpointError, match=r"desirable_weight: 1\.0 in the checkpoint"):
        other.train(resume_from_checkpoint=str(tmp_path / "parts" / "run" / "checkpoint-2"))


def test_a_later_run_finds_all_log_probs_in_the_store(tmp_path):
    make_kto(tmp_path).train()
    later = make_kto(tmp_path, options={"per_device_train_batch_size": 1, "seed": 5})
    later.train()
    assert later.reference.store.totals().rows_scored == 0


def test_pairs_are_split(tmp_path, caplog):
    pairs = token_pairs(6)
    with caplog.at_level("INFO"):
        trainer = make_kto(tmp_path, rows=pairs)
    assert "kto takes answers one by one, so its 6 pairs are split into 12 rows" in caplog.text
    rows = trainer.train_set().pairs
    assert rows["label"][:] == [True, False] * 6
    assert rows["mismatched_ids"][2:4] == [pairs[0]["chosen_ids"], pairs[0]["rejected_ids"]]
    trainer.train()
    assert trainer.first_loss == pytest.approx(0.5, abs=1e-5)


def one_label(rows):
    return rows.map(lambda row: {"label": True})


def one_prompt(rows):
    return rows.map(lambda row: {"prompt_ids": [5]})


@pytest.mark.parametrize(
    ("change", "options", "error", "words"),
    [
        (one_label, {}, DataError, "all 10 rows are desirable, and KTO needs answers of both"),
        (one_prompt, {}, DataError, "all 10 rows have the same prompt, and kto compares with"),
        (None, {"loss_type": "sigmoid"}, ConfigError, "KTOTrainer trains kto or apo_zero_unpaired"),
        (
            lambda rows: rows.to_iterable_dataset(),
            {},
            ConfigError,
            "train_dataset is a stream, and kto trains datasets that are read as a whole",
        ),
    ],
)
def test_what_it_cannot_train_is_refused(tmp_path, change, options, error, words):
    rows = answer_rows()
    with pytest.raises(error, match=words):
        make_kto(tmp_path, rows=rows if change is None else change(rows), options=options)


def test_one_prompt_is_enough_without_z(tmp_path):
    trainer = make_kto(
        tmp_path, rows=one_prompt(answer_rows()), options={"loss_type": "apo_zero_unpaired"}
    )
    trainer.train()
    assert trainer.reference.store.totals().rows_needed == 10


def test_functions_of_pairs_and_predictions_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="metrics_fn isn't supported: it takes pairs"):
        make_kto(tmp_path, metrics_fn=lambda outputs: {})
    with pytest.raises(ConfigError, match="but the kto loss has none; leave it out"):
        make_kto(tmp_path, options={"metrics": ["entropy"]})
    trainer = make_kto(tmp_path, eval_dataset=answer_rows())
    trainer.compute_metrics = lambda prediction: {}
    with pytest.raises(ConfigError, match="compute_metrics isn't supported: it takes pairs"):
        trainer.evaluate()
    with pytest.raises(ConfigError, match="predict: predictions are those of pairs"):
        make_kto(tmp_path).predict(answer_rows())
    with pytest.raises(ConfigError, match="loss_type: kto takes answers one by one"):
        make_kto(tmp_path, trainer_class=DPOTrainer)


def test_a_loss_outside_of_a_step_has_no_z(tmp_path):
    trainer = make_kto(tmp_path)
    step = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(ConfigError, match="compute_loss: the loss kto compares with a mean over"):
        trainer.compute_loss(trainer.model, step)


def test_workers_lay_out_the_same_steps(tmp_path):
    alone = make_kto(tmp_path / "alone", options={"max_steps": 3})
    alone.train()
    workers = make_kto(tmp_path / "workers", options={"max_steps": 3, "dataloader_num_workers": 2})
    workers.train()
    assert history(workers) == history(alone)


def test_the_best_checkpoint_is_chosen_by_a_metric_that_is_measured(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps"}
    options |= {"save_steps": 3, "metric_for_best_model": "rewards/accuracies"}
    trainer = make_kto(tmp_path, options=options, eval_dataset=answer_rows())
    with pytest.raises(ConfigError, match="no evaluation of this run measures 'eval_rewards/acc"):
        trainer.train()
    options |= {"metric_for_best_model": "kl", "loss_type": "apo_zero_unpaired"}
    trainer = make_kto(tmp_path, options=options, eval_dataset=answer_rows())
    with pytest.raises(ConfigError, match="no evaluation of this run measures 'eval_kl'"):
        trainer.train()
    options |= {"metric_for_best_model": "rewards/margins", "loss_type": "kto"}
    trainer = make_kto(tmp_path, options=options, eval_dataset=answer_rows())
    trainer.train()
    assert trainer.state.best_metric is not None


def test_an_infinite_log_ratio_is_not_clamped_to_0(tmp_path):
    trainer = make_kto(tmp_path)
    step = next(iter(trainer.get_train_dataloader()))
    for total in (-torch.inf, torch.inf, torch.nan):
        own = [torch.zeros(batch.num_pairs).double() for batch in step.micro_batches]
        found = with_z(step, own, torch.tensor(total, dtype=torch.float64))
        assert all(batch.z.isnan() for batch in found.micro_batches)


@pytest.fixture
def one_bad_mismatched_answer(monkeypatch):
    """Gives a trainer a NaN for one mismatched answer of each step; returns their rows."""

    def poison(trainer):
        rows, prepared_step = [], trainer.prepared_step

        def of_step(model, batches, *args):
            found = mismatched_logratios(model, batches, *args)
            found[-1][-1] = torch.nan
            return found

        def prepared(step):
            rows.append(step.indices[-1][-1])
            return prepared_step(step)

        monkeypatch.setattr(kto, "mismatched_logratios", of_step)
        trainer.prepared_step = prepared
        return rows

    return poison


@pytest.mark.parametrize("options", [{}, {"max_tokens_per_microbatch": 1}], ids=str)
def test_a_bad_mismatched_answer_is_named_by_its_row(tmp_path, one_bad_mismatched_answer, options):
    """Its NaN is in z, and so in the loss of every row of the step."""
    trainer = make_kto(tmp_path, options=options)
    rows = one_bad_mismatched_answer(trainer)
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    assert f"the loss is NaN or infinite at row {rows[0]} of train, counted" in str(caught.value)


def test_a_bad_mismatched_answer_of_an_evaluation_is_named_by_its_row(
    tmp_path, one_bad_mismatched_answer, caplog
):
    options = {"per_device_eval_batch_size": 5, "max_tokens_per_microbatch": 40}
    trainer = make_kto(tmp_path, options=options, eval_dataset=answer_rows())
    rows = one_bad_mismatched_answer(trainer)
    trainer.evaluate()
    assert len(rows) == 2
    low, high = sorted(rows)
    assert f"The loss of eval is nan, which comes from rows {low}, {high} (counted" in caplog.text


def test_messages_about_unpaired_data_speak_of_rows(tmp_path, caplog):
    written = [{"prompt": "a", "completion": "b", "label": True}]
    written += [{"prompt": "c", "completion": "d", "label": False}]
    rows = Dataset.from_list([{**row, "weight": 2.0} for row in written])
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    with caplog.at_level("INFO"):
        make_kto(tmp_path, rows=rows, processing_class=tokenizer)
    assert "train: the rows have weight from 2 to 2" in caplog.text
    assert "train: the rows are text, so they are tokenised as they are" in caplog.text
    assert "give prompts and answers as lists of messages" in caplog.text
    assert "pair" not in "".join(m for m in caplog.messages if m.startswith("train: "))
    with pytest.raises(DataError, match="the weight of every row is 0, so no row counts; raise"):
        make_kto(tmp_path, rows=Dataset.from_list([{**row, "weight": 0.0} for row in written]))


@pytest.mark.parametrize(
    ("loss_type", "name", "paper"),
    [("kto", "KTO", "2402.01306"), ("apo_zero_unpaired", "APO", "2408.06266")],
)
def test_cards_name_the_method(tmp_path, loss_type, name, paper):
    trainer = make_kto(tmp_path, options={"loss_type": loss_type, "max_steps": 1})
    trainer.train()
    trainer.create_model_card()
    text = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert f"by [{name}](https://huggingface.co/papers/{paper})" in text
    assert "| dataset | used for | answers |" in text
    assert "| answers per step | 4 |" in text
    assert "Reward accuracy" not in text
    assert "Direct Preference" not in text
