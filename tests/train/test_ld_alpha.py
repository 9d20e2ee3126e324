"""LD-DPO: the end of the longer answer counts alpha, for the policy and for its reference."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset

from dpofast.errors import DataError, MissingRowsError, ModelError
from dpofast.reference.store.row_detail import RowDetail
from dpofast_kernels import make_loss
from tests.kernels.preference.formulas import plain_formula
from tests.support import (
    BETA,
    float64_throughout,
    make_trainer,
    tiny_llama,
    token_pairs,
    train,
)
from tests.train.data.stream_runs import logs_of, run, stream_of

# Longer, shorter and equal answers; the first two pairs begin alike.
LENGTHS = [(3, 9), (8, 2), (5, 5), (1, 6), (7, 1)]
SIDES = ("chosen", "rejected")
ALPHAS = [0.0, 0.5, 1.0]


def pairs_of_lengths(seed=0):
    rng = np.random.default_rng(seed)

    def ids(count):
        return rng.integers(3, 259, count).tolist()

    rows = [
        {"prompt_ids": ids(4), "chosen_ids": ids(chosen), "rejected_ids": ids(rejected)}
        for chosen, rejected in LENGTHS
    ]
    for row in rows[:2]:
        row["rejected_ids"][:2] = row["chosen_ids"][:2]
    return Dataset.from_list(rows)


def token_logps(model, prompt, answer):
    """[n] log-probs of an answer's tokens, from all logits of its sequence."""
    logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits
    scored = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return scored.gather(-1, torch.tensor(answer)[:, None])[:, 0]


def plain_sums(model, pair, alpha):
    """The weighted log-prob [] of each answer, by the formula of the paper."""
    shared = min(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
    each = [token_logps(model, pair["prompt_ids"], pair[f"{side}_ids"]) for side in SIDES]
    return [logps[:shared].sum() + alpha * logps[shared:].sum() for logps in each]


def stored_sums(reference, pair, alpha):
    """The same of the reference, whose log-probs are stored: of tokens in float32, sums in full."""
    shared = min(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
    sums = []
    for side in SIDES:
        with torch.no_grad():
            logps = token_logps(reference, pair["prompt_ids"], pair[f"{side}_ids"])
        stored = logps.numpy().astype(np.float64 if alpha == 1.0 else np.float32).astype(np.float64)
        sums.append(stored[:shared].sum() + alpha * stored[shared:].sum())
    return sums


def plain_step(model, reference, pairs, alpha, formula):
    """The mean loss of a textbook loop over pairs; its gradients are in the model."""
    total = 0.0
    for pair in pairs:
        lengths = torch.tensor([[len(pair[f"{side}_ids"]) for side in SIDES]])
        policy, ref = plain_sums(model, pair, alpha), stored_sums(reference, pair, alpha)
        ratios = [(logp - ref_logp).view(1) for logp, ref_logp in zip(policy, ref, strict=True)]
        loss = formula(*ratios, lengths).sum() / len(pairs)
        loss.backward()
        total += loss.item()
    return total


def formula(name, **options):
    loss = make_loss(name, BETA, **options)
    return lambda a, b, lengths: plain_formula(loss, a, b, lengths)


def own_loss(chosen, rejected, lengths):
    return torch.relu(1 - chosen / lengths[:, 0]) + torch.relu(1 + 2 * rejected / lengths[:, 1])


# The options of a loss or the loss itself, with the formula of its pairs.
LOSSES = {
    "sigmoid": ({}, {}, formula("sigmoid")),
    "length-normalised": ({"loss_type": "sigmoid_norm"}, {}, formula("sigmoid_norm")),
    "mixture": (
        {"loss_type": ["ipo", "apo_zero"], "loss_weights": [0.8, 0.2]},
        {},
        lambda a, b, n: 0.8 * formula("ipo")(a, b, n) + 0.2 * formula("apo_zero")(a, b, n),
    ),
    "own": ({}, {"loss_fn": own_loss}, own_loss),
}
CASES = [("sigmoid", alpha) for alpha in ALPHAS] + [(name, 0.5) for name in list(LOSSES)[1:]]


@pytest.mark.parametrize(
    "layout",
    [{"layout": "shared"}, {"layout": "padded"}, {"max_tokens_per_microbatch": 1}],
    ids=str,
)
@pytest.mark.parametrize(("name", "alpha"), CASES)
@pytest.mark.slow
def test_a_float64_step_is_that_of_a_textbook_loop(tmp_path, name, alpha, layout):
    options, arguments, plain = LOSSES[name]
    options = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 1, **options}
    pairs = pairs_of_lengths()
    with float64_throughout():
        model, reference = tiny_llama().double(), tiny_llama(seed=1).double()
        expected = plain_step(copied := copy.deepcopy(model), reference, pairs, alpha, plain)
        trainer = make_trainer(
            tmp_path,
            model,
            pairs,
            options={"ld_alpha": alpha, **options, **layout},
            ref_model=reference,
            **arguments,
        )
        (step,) = trainer.get_train_dataloader()
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, step)
        loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    largest = max(p.grad.abs().max() for p in copied.parameters())
    assert largest > 1e-3
    for ours, theirs in zip(model.parameters(), copied.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().max() <= 1e-10 * largest


def test_one_trains_bitwise_as_without_it_and_reads_sums(tmp_path):
    sums = {"reference_store_detail": "sums", "max_steps": 2}
    expected = train(make_trainer(tmp_path, options=sums))
    assert train(make_trainer(tmp_path, options={"ld_alpha": 1.0, **sums})) == expected
    assert train(make_trainer(tmp_path, options={"ld_alpha": 0.9, "max_steps": 2})) != expected


def test_a_store_of_sums_is_scored_again_and_only_once(tmp_path):
    """The policy starts as its reference, so the step-0 check sees the weighted sums."""
    make_trainer(tmp_path, options={"reference_store_detail": "sums"}).score_datasets()
    options = {"ld_alpha": 0.5, "max_steps": 2}
    trainer = make_trainer(tmp_path, options=options)
    logs = train(trainer)
    assert trainer.reference.store.totals().rows_scored == 20
    counts = trainer.reference.store.namespace.counts()
    assert counts.rows == counts.of_detail[RowDetail.LOGPS] == 20
    again = make_trainer(tmp_path, options=options)
    again.score_datasets()
    assert again.reference.store.totals().rows_scored == 0
    temporary = {**options, "precompute_ref_log_probs": False}
    assert train(make_trainer(tmp_path / "none", options=temporary)) == logs


def test_a_store_of_sums_whose_reference_is_gone_is_an_error(tmp_path):
    """After step 1, nothing can score the answers of a model without a name again."""
    later = token_pairs(3, seed=8)
    held = {"reference_store_detail": "sums"}
    make_trainer(tmp_path, eval_dataset=later, options=held).score_datasets()
    trainer = make_trainer(tmp_path, options={"ld_alpha": 0.5, "max_steps": 1})
    trainer.train()
    with pytest.raises(MissingRowsError, match="6 of them are stored without per-token log-probs"):
        trainer.evaluate(later)


def test_a_store_of_sums_whose_reference_is_found_again_is_scored_again(tmp_path):
    later = token_pairs(3, seed=8)
    tiny_llama().save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")
    held = {"reference_store_detail": "sums"}
    make_trainer(tmp_path, name, eval_dataset=later, options=held).score_datasets()
    trainer = make_trainer(tmp_path, name, options={"ld_alpha": 0.5, "max_steps": 1})
    trainer.train()
    before = trainer.reference.store.totals().rows_scored
    assert np.isfinite(trainer.evaluate(later)["eval_loss"])
    assert trainer.reference.store.totals().rows_scored == before + 6


def test_columns_of_summed_log_probs_are_refused(tmp_path):
    rows = [
        {**row, "ref_chosen_logps": -20.0, "ref_rejected_logps": -21.0} for row in token_pairs(4)
    ]
    message = (
        r"train brings ref_chosen_logps and ref_rejected_logps, sums over whole answers, but "
        r"ld_alpha=0\.5 needs the reference's log-prob of each token: leave these columns out"
    )
    options = {"ld_alpha": 0.5}
    with pytest.raises(DataError, match=message):
        make_trainer(tmp_path, pairs=Dataset.from_list(rows), options=options)
    with pytest.raises(DataError, match=message):
        make_trainer(tmp_path, pairs=stream_of(rows), options=options)
    with pytest.raises(DataError, match="eval brings ref_chosen_logps"):
        make_trainer(tmp_path, eval_dataset=Dataset.from_list(rows), options=options)
    make_trainer(tmp_path, pairs=Dataset.from_list(rows), options={"ld_alpha": 1.0})


def test_a_stream_trains_bitwise_as_a_list_of_its_rows(tmp_path):
    options, rows = {"ld_alpha": 0.25, "max_steps": 3}, token_pairs(10).to_list()
    _, expected = run(tmp_path, rows, options=options)
    _, logs = run(tmp_path, stream_of(rows), options=options)
    assert logs == expected


def test_a_resumed_run_goes_on_bitwise(tmp_path):
    options = {"ld_alpha": 0.25, "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    first = make_trainer(tmp_path, options=options)
    first.train()
    resumed = make_trainer(tmp_path, options=options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert logs_of(resumed) == logs_of(first)


def test_evaluation_and_predictions_are_those_of_weighted_sums(tmp_path):
    reference, pairs = tiny_llama(seed=1), pairs_of_lengths()
    trainer = make_trainer(tmp_path, options={"ld_alpha": 0.25}, ref_model=reference)
    output = trainer.predict(pairs)
    with torch.no_grad():
        policy = np.array([plain_sums(trainer.model.eval(), pair, 0.25) for pair in pairs])
        ref = np.array([plain_sums(reference, pair, 0.25) for pair in pairs])
    found = output.predictions
    for side, name in enumerate(SIDES):
        rewards = BETA * (policy - ref)[:, side]
        for column, expected in (
            (f"{name}_logps", policy[:, side]),
            (f"ref_{name}_logps", ref[:, side]),
            (f"{name}_rewards", rewards),
        ):
            np.testing.assert_allclose(getattr(found, column), expected, atol=1e-4, rtol=0)
        assert getattr(found, f"{name}_lengths").tolist() == [each[side] for each in LENGTHS]
        assert output.metrics[f"test_rewards/{name}"] == pytest.approx(rewards.mean(), abs=1e-4)
        assert output.metrics[f"test_logps/{name}"] == pytest.approx(policy[:, side].mean())
        # A log-ratio per token divides by all tokens.
        per_token = ((policy - ref) / np.array(LENGTHS))[:, side].mean()
        assert output.metrics[f"test_logratios/{name}"] == pytest.approx(per_token, abs=1e-5)


def test_the_check_of_the_first_batch_weights_tokens_too(tmp_path):
    """A policy that computes something else in training mode is told from a wrong reference."""
    model = tiny_llama()
    model.model.norm.register_forward_hook(
        lambda module, _, output: output * 1.5 if module.training else output
    )
    with pytest.raises(ModelError, match=r"first batch.*something else in training mode"):
        train(make_trainer(tmp_path, model, options={"ld_alpha": 0.25}))


def test_a_float64_run_begins_as_its_own_reference(tmp_path):
    """The store rounds log-probs of tokens to float32, which its first batch may show."""
    with float64_throughout():
        options = {"ld_alpha": 0.5, "max_steps": 1}
        trainer = make_trainer(tmp_path, tiny_llama().double(), options=options)
        assert train(trainer)[0][0] == pytest.approx(np.log(2), abs=1e-6)
