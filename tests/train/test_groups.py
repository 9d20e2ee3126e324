"""Pairs of a prompt in groups train as the same pairs by themselves, whatever the loss needs."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from dpofast.data import mix_preferences
from dpofast.errors import ModelError, NonFiniteError
from dpofast.options.metric_fields import TOKEN_METRICS
from dpofast.train import trainer as trainer_module
from dpofast_kernels import CoupledFunction
from tests.coupled import Gradients, neighbours
from tests.groups import all_pairs
from tests.support import (
    BETA,
    VOCAB_SIZE,
    answer_logps,
    float64_throughout,
    make_trainer,
    tiny_llama,
    tiny_mixtral,
)
from tests.train.test_wpo import sharp_llama

SIDES = ("chosen_ids", "rejected_ids")
# What a log says about the run's speed and its rows, which differ.
OF_THE_WORK = ("pairs_per_s", "tokens_per_s", "lengths/row", "memory/", "mfu")


def pools(num_prompts: int = 2, num_answers: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs of the answers to some prompts, in random order. Some answers begin alike.

    They are all pairs but one, and one of them again, so that some answers are in more pairs.
    """
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(3, VOCAB_SIZE) for _ in range(count)]

    rows = []
    for _ in range(num_prompts):
        prompt, start = ids(rng.randint(1, 9)), ids(3)
        answers = [start[: rng.randint(0, 3)] + ids(rng.randint(1, 9)) for _ in range(num_answers)]
        pairs = all_pairs(num_answers)
        for chosen, rejected in [*pairs[1:], pairs[-1]]:
            both = {"chosen_ids": answers[chosen], "rejected_ids": answers[rejected]}
            rows.append({"prompt_ids": prompt, **both})
    rng.shuffle(rows)
    return rows


def numbered(rows: list[dict[str, Any]], **columns: Any) -> Dataset:
    """The pairs with more columns, each a function of the pair's number."""
    return Dataset.from_list(
        [{**row, **{name: of(i) for name, of in columns.items()}} for i, row in enumerate(rows)]
    )


def own_reference(rows):
    """An answer has another log-prob in every pair."""
    return numbered(
        rows, ref_chosen_logps=lambda i: -30.0 - i / 7, ref_rejected_logps=lambda i: -31.0 + i / 9
    )


def of_one_length(rows):
    """All answers have one length, so that ld_alpha weights none of their tokens."""
    return numbered([{**row, **{side: row[side][:1] * 5 for side in SIDES}} for row in rows])


def ipo_by_hand(chosen_logratios, rejected_logratios, lengths):
    margins = chosen_logratios / lengths[:, 0] - rejected_logratios / lengths[:, 1]
    return (margins - 0.5 / BETA).square()


def own_metrics(pairs):
    logratios = pairs.chosen_logps - pairs.ref_chosen_logps
    return {"kl/longer": logratios * pairs.lengths[:, 0], "own": pairs.rejected_logps}


def mixture(rows):
    sets = {"a": numbered(rows[::3]), "b": numbered(rows[1::3] + rows[2::3])}
    return mix_preferences(sets, {"a": 2.0, "b": 1.0})


def experts(seed=0):
    model = tiny_mixtral(seed, output_router_logits=True).double()
    model.set_experts_implementation("eager")  # the grouped kernels take no float64
    return model


@dataclass(frozen=True)
class Run:
    """Options of a run, arguments of its trainer, its pairs, and what makes its model."""

    options: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    pairs: Any = numbered
    model: Any = sharp_llama

    @property
    def loss_type(self) -> list[str]:
        names = self.options.get("loss_type", "sigmoid")
        return [names] if isinstance(names, str) else names


def weighted(rows):
    return numbered(
        rows, weight=lambda i: [1.0, 0.0, 0.25, 3.0][i % 4], label_confidence=lambda i: 0.6 + i / 50
    )


RUNS = {
    "sigmoid": Run(),
    "padded": Run({"layout": "padded"}),
    "ipo": Run({"loss_type": "ipo"}),
    "sigmoid_norm": Run({"loss_type": "sigmoid_norm"}),
    "likelihood": Run({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}),
    "likelihood of a padded mixture": Run(
        {"loss_type": ["sigmoid", "robust", "sft"], "loss_weights": [0.5, 0.2, 1.0]}
        | {"layout": "padded"},
        pairs=weighted,
    ),
    "sft": Run({"loss_type": "sft"}),
    "orpo": Run({"loss_type": "orpo"}),
    "cpo": Run({"loss_type": "cpo"}),
    "simpo": Run({"loss_type": "simpo"}),
    "ld_alpha": Run({"ld_alpha": 0.4}),
    "ld_alpha in a mixture, padded": Run(
        {"ld_alpha": 0.4, "loss_type": ["sigmoid", "ipo"], "layout": "padded"}
    ),
    "ld_alpha, one length": Run({"ld_alpha": 0.4}, pairs=of_one_length),
    "columns": Run(pairs=weighted),
    "wpo": Run({"use_weighting": True}),
    "wpo with likelihood": Run(
        {"use_weighting": True, "loss_type": ["sigmoid", "sft"]},
        pairs=weighted,
    ),
    "wpo with ld_alpha": Run(
        {"use_weighting": True, "ld_alpha": 0.4},
        pairs=weighted,
    ),
    "aot": Run({"loss_type": "aot"}),
    "aot_unpaired with likelihood, padded": Run(
        {"loss_type": ["aot_unpaired", "sft"], "layout": "padded"}
    ),
    "coupled function": Run(given={"loss_fn": CoupledFunction(neighbours)}),
    "own loss and metrics": Run(given={"loss_fn": ipo_by_hand, "metrics_fn": own_metrics}),
    "token metrics": Run({"metrics": list(TOKEN_METRICS)}),
    "token metrics, padded": Run(
        {"metrics": list(TOKEN_METRICS), "layout": "padded", "loss_type": "orpo"}
    ),
    "target_kl": Run({"target_kl": 0.01, "target_kl_gain": 0.5}),
    "own reference": Run(pairs=own_reference),
    "own reference, likelihood": Run(
        {"loss_type": ["sigmoid", "sft"], "layout": "padded"}, pairs=own_reference
    ),
    "datasets": Run(pairs=mixture),
    "datasets, aot": Run({"loss_type": "aot"}, pairs=mixture),
    "datasets, likelihood": Run({"loss_type": ["sigmoid", "sft"]}, pairs=mixture),
    "cut groups": Run({"max_tokens_per_microbatch": 60}),
    "cut groups, all else": Run(
        {"max_tokens_per_microbatch": 60, "use_weighting": True, "metrics": list(TOKEN_METRICS)}
        | {"loss_type": ["sigmoid", "sft"]},
        pairs=weighted,
    ),
    "cut groups, aot": Run({"max_tokens_per_microbatch": 60, "loss_type": ["aot", "sft"]}),
    "padded micro-batches": Run(
        {"layout": "padded", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
        | {"loss_type": ["sigmoid", "sft"], "per_device_eval_batch_size": 5},
        pairs=weighted,
    ),
    "experts": Run(model=experts),
    "experts, padded": Run({"layout": "padded"}, model=experts),
}


def apart(monkeypatch):
    """Let the layouts of trainers run every pair by itself."""
    choose = trainer_module.choose_layout
    monkeypatch.setattr(
        *(trainer_module, "choose_layout"),
        lambda *args: replace(choose(*args), merges=False),
    )


class Done:
    """A run of two steps of all pairs, whose policy isn't its reference, and its evaluation."""

    def __init__(self, folder, run: Run) -> None:
        kept, self.seen = Gradients(), []
        options = {
            **{"max_steps": 2, "per_device_train_batch_size": 12, "optim": "sgd"},
            **{"gradient_accumulation_steps": 1, "max_tokens_per_microbatch": 4096},
            **{"include_for_metrics": ["loss"], "per_device_eval_batch_size": 12},
            **run.options,
        }
        needs_none = set(run.loss_type) <= {"sft", "orpo", "cpo", "simpo"}
        needs_none |= run.pairs is own_reference
        if set(run.loss_type) & {"sft", "orpo", "cpo"}:
            del options["include_for_metrics"]  # pairs have no losses of their own
        with float64_throughout():
            self.trainer = make_trainer(
                *(folder, run.model(), run.pairs(pools())),
                options=options,
                eval_dataset=run.pairs(pools(num_answers=3, seed=5)),
                compute_metrics=lambda seen: self.seen.append(seen) or {},
                callbacks=[kept],
                ref_model=None if needs_none else run.model(seed=1),
                **run.given,
            )
            self.step = next(iter(self.trainer.get_train_dataloader()))
            self.trainer.train()
            self.evaluated = self.trainer.evaluate()
        self.gradients = kept.grads

    def logs(self) -> list[dict[str, float]]:
        return [
            {
                name: value
                for name, value in log.items()
                if isinstance(value, float) and not name.removeprefix("eval_").startswith(SKIPPED)
            }
            for log in [*self.trainer.state.log_history, self.evaluated]
        ]

    @property
    def body_tokens(self) -> int:
        return sum(batch.num_body_tokens for batch in self.step.micro_batches)

    @property
    def num_tokens(self) -> int:
        return sum(batch.num_tokens for batch in self.step.micro_batches)

    @property
    def predictions(self) -> list[np.ndarray]:
        (seen,) = self.seen
        return [*seen.predictions, *([] if seen.losses is None else [seen.losses])]


SKIPPED = (*OF_THE_WORK, "train_runtime", "train_s", "runtime", "samples_per", "steps_per")


# Runs that touch most of the code; the others are slow together.
QUICK = ("likelihood of a padded mixture", "wpo with ld_alpha", "datasets, aot")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in RUNS],
)
def test_groups_train_as_pairs_by_themselves(tmp_path, monkeypatch, name):
    """Loss, gradients, all metrics, and the values of each pair in the dataset's order."""
    found = Done(tmp_path / "groups", RUNS[name])
    apart(monkeypatch)
    expected = Done(tmp_path / "pairs", RUNS[name])
    assert found.body_tokens < 0.85 * expected.body_tokens
    assert found.num_tokens == expected.num_tokens
    largest = max(gradient.abs().max() for gradient in expected.gradients)
    assert largest > 1e-4
    for ours, theirs in zip(found.gradients, expected.gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-9 * largest
    for ours, theirs in zip(found.logs(), expected.logs(), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-8, abs=1e-10)
    for ours, theirs in zip(found.predictions, expected.predictions, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)


class _NanAt:
    """The loss of one pair is NaN, which is known by the lengths of its answers."""

    def __init__(self, pair):
        self.sizes = torch.tensor([len(pair["chosen_ids"]), len(pair["rejected_ids"])])

    def __call__(self, chosen, rejected, lengths):
        losses = torch.nn.functional.softplus(rejected - chosen)
        return torch.where((lengths == self.sizes).all(1), torch.nan, losses)


@pytest.mark.parametrize("layout", ["shared", pytest.param("padded", marks=pytest.mark.slow)])
def test_the_row_of_a_loss_that_is_nan_is_named(tmp_path, layout):
    """Rows are numbered as in the dataset, though a group changes their order."""
    rows = pools(num_prompts=1)
    sizes = [(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    place = max(i for i in range(6) if sizes.count(sizes[i]) == 1)
    options = {"layout": layout, "per_device_train_batch_size": 6, "max_steps": 1}
    trainer = make_trainer(
        *(tmp_path, None, numbered(rows)), options=options, loss_fn=_NanAt(rows[place])
    )
    with pytest.raises(NonFiniteError, match=f"NaN or infinite at row {place} of train"):
        trainer.train()


def test_a_reference_that_is_not_the_policy_stops_a_run_of_groups(tmp_path, monkeypatch):
    """The check of the first batch says the same as with pairs by themselves."""
    messages = []
    for name in ("groups", "pairs"):
        if name == "pairs":
            apart(monkeypatch)
        options = {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1}
        trainer = make_trainer(tmp_path / name, None, numbered(pools()), options=options)
        next(iter(trainer.get_train_dataloader()))  # the reference is scored
        with torch.no_grad():
            trainer.model.lm_head.weight.mul_(1.5)
        with pytest.raises(ModelError, match="the reference log-probs are not those") as raised:
            trainer.train()
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_answers_with_dropout_run_once_for_each_pair(tmp_path, layout):
    """Two runs of an answer draw other noise, as in plain DPO."""
    options = {"layout": layout, "per_device_train_batch_size": 6, "disable_dropout": False}
    for rate, is_grouped in ((0.3, False), (0.0, True)):
        model = tiny_llama(attention_dropout=rate)
        rows = numbered(pools(num_prompts=1))
        trainer = make_trainer(tmp_path / str(rate), model, rows, options=options)
        (batch,) = next(iter(trainer.get_train_dataloader())).micro_batches
        assert (batch.pairs is not None) == is_grouped


@pytest.mark.slow
def test_adapters_with_dropout_run_answers_once_for_each_pair(tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra `peft`")
    for rate in (0.3, 0.0):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=rate)
        trainer = make_trainer(
            *(tmp_path / str(rate), tiny_llama(), numbered(pools(num_prompts=1))),
            options={"per_device_train_batch_size": 6, "disable_dropout": False},
            peft_config=config,
        )
        (batch,) = next(iter(trainer.get_train_dataloader())).micro_batches
        assert (batch.pairs is None) == (rate > 0.0)


@pytest.mark.slow
def test_predict_has_the_pairs_in_the_order_of_the_dataset(tmp_path):
    rows = pools(seed=3)
    trainer = make_trainer(tmp_path, tiny_llama(1), ref_model=tiny_llama())
    found = trainer.predict(numbered(rows)).predictions
    for side in ("chosen", "rejected"):
        with torch.no_grad():
            expected = [
                answer_logps(trainer.model, row["prompt_ids"], row[f"{side}_ids"]) for row in rows
            ]
        np.testing.assert_allclose(getattr(found, f"{side}_logps"), expected, rtol=1e-5)
