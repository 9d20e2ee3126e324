"""Coupled losses with other options, in evaluations, and in the checks of a run."""

from __future__ import annotations

import logging
from typing import ClassVar

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from dpofast import CoupledFunction, DPOTrainer
from dpofast.data import mix_preferences
from dpofast.errors import ConfigError, DataError, ModelError, NonFiniteError
from dpofast_kernels import make_coupled_loss, make_loss
from tests.coupled import (
    Doubled,
    first_gradients,
    neighbours,
)
from tests.support import (
    BETA,
    float64_throughout,
    history,
    make_trainer,
    tiny_llama,
    token_pairs,
    train,
)


class TestWithOtherOptions:
    SINGLE: ClassVar = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}

    def test_a_likelihood_term_adds_its_gradients(self, tmp_path):
        found = []
        for names, weights in ((["aot"], [1.0]), (["sft"], [0.5]), (["aot", "sft"], [1.0, 0.5])):
            options = {"loss_type": names, "loss_weights": weights, "max_steps": 1}
            options |= {"max_tokens_per_microbatch": 40}
            grads, trainer = first_gradients(tmp_path / "-".join(names), options, {})
            found.append((grads, history(trainer)[0][0]))
        (aot_grads, aot_loss), (sft_grads, sft_loss), (both_grads, both_loss) = found
        assert both_loss == pytest.approx(aot_loss + sft_loss, rel=1e-12)
        for parts in zip(both_grads, aot_grads, sft_grads, strict=True):
            torch.testing.assert_close(parts[0], parts[1] + parts[2], rtol=0, atol=1e-10)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"ld_alpha": 0.3},
            {"beta_schedule": "linear", "beta_end": 0.05},
            {"target_kl": 0.01, "target_kl_gain": 1.0},
        ],
    )
    def test_one_pair_in_a_step_has_the_sigmoid_loss(self, tmp_path, options):
        runs = []
        for names in (["sigmoid"], ["aot"]):
            given = {**self.SINGLE, **options, "loss_type": names}
            with float64_throughout():
                trainer = make_trainer(tmp_path / names[0], tiny_llama().double(), options=given)
                trainer.train()
            names = ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "kl/absolute")
            logs = trainer.state.log_history[:6]
            runs.append([[log[name] for name in names] for log in logs])
        np.testing.assert_allclose(runs[1], runs[0], rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("name", ["weight", "label_confidence"])
    def test_weights_and_confidences_of_pairs_are_refused(self, tmp_path, name):
        pairs = token_pairs(10).add_column(name, [0.5] * 9 + [1.0])
        with pytest.raises(DataError, match=f"{name}: the aot loss couples pairs"):
            make_trainer(tmp_path, pairs=pairs, options={"loss_type": "aot"})

    def test_each_dataset_of_a_mixture_has_its_part_of_the_loss(self, tmp_path):
        def mixed(seed):
            parts = {"small": token_pairs(3, seed=seed), "large": token_pairs(6, seed=seed + 1)}
            return mix_preferences(parts)

        trainer = make_trainer(
            *(tmp_path, None, mixed(1)),
            options={"loss_type": "aot_unpaired", "max_tokens_per_microbatch": 40},
            eval_dataset=mixed(5),
            ref_model=tiny_llama(seed=1),
        )
        train(trainer)
        found = trainer.evaluate()
        total = (3 * found["eval_loss/small"] + 6 * found["eval_loss/large"]) / 9
        assert found["eval_loss"] == pytest.approx(total, rel=1e-9)
        assert min(found["eval_loss/small"], found["eval_loss/large"]) > 0.1


class TestEvaluation:
    @pytest.mark.parametrize("batch_size", [1, 3])
    @pytest.mark.parametrize("is_whole", [True, False])
    def test_the_loss_is_that_of_the_whole_set(self, tmp_path, batch_size, is_whole):
        held_out = token_pairs(7, seed=4)
        options = {
            "loss_type": ["aot_unpaired", "sigmoid"],
            "per_device_eval_batch_size": batch_size,
            "max_tokens_per_microbatch": 30,
            "prediction_loss_only": is_whole,
        }
        given = {"options": options, "eval_dataset": held_out, "ref_model": tiny_llama(seed=1)}
        trainer = make_trainer(tmp_path, **given)
        found = trainer.evaluate()
        predicted = make_trainer(
            tmp_path, **{**given, "options": {**options, "prediction_loss_only": False}}
        ).predict(held_out)
        values = predicted.predictions
        logps = [torch.from_numpy(np.array(values[index])) for index in range(4)]
        lengths = torch.from_numpy(np.stack(values[6:8], 1)).long()
        loss = make_coupled_loss(["aot_unpaired", "sigmoid"], beta=BETA).losses(*logps, lengths)
        assert found["eval_loss"] == pytest.approx(loss.mean().item(), rel=1e-6)
        assert predicted.metrics["test_loss"] == pytest.approx(loss.mean().item(), rel=1e-6)
        by_pair = make_loss("sigmoid", beta=BETA).losses(*logps, lengths).mean().item()
        assert abs(loss.mean().item() / (2 * by_pair) - 1) > 1e-3
        doubled = make_trainer(tmp_path, trainer_class=Doubled, **given).evaluate()
        assert doubled["eval_loss"] == pytest.approx(2 * found["eval_loss"], rel=1e-6)
        assert doubled["eval_logps/chosen"] == pytest.approx(found["eval_logps/chosen"])

    def test_what_a_function_returns_for_the_set_is_checked(self, tmp_path):
        def of_few(chosen, rejected, lengths):
            losses = neighbours(chosen, rejected, lengths)
            return losses if len(chosen) in (33, 8, 2) else losses.mean()

        given = {"loss_fn": CoupledFunction(of_few), "eval_dataset": token_pairs(5, seed=4)}
        for kind in (DPOTrainer, Doubled):
            trainer = make_trainer(tmp_path, trainer_class=kind, **given)
            with pytest.raises(ConfigError, match=r"^loss_fn: it returned \[\] .* for 5 pairs"):
                trainer.evaluate()

    def test_it_runs_between_steps_and_for_compute_metrics(self, tmp_path):
        seen = []

        def measure(prediction):
            seen.append(prediction.losses.mean())
            return {}

        options = {
            "loss_type": "aot_unpaired",
            "eval_strategy": "steps",
            "eval_steps": 3,
            "include_for_metrics": ["loss"],
            "metric_for_best_model": "loss",
        }
        trainer = make_trainer(
            *(tmp_path,),
            options=options,
            eval_dataset=token_pairs(5, seed=4),
            compute_metrics=measure,
        )
        plain = make_trainer(tmp_path / "plain", options={"loss_type": "aot_unpaired"})
        assert train(trainer) == train(plain)
        logged = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
        assert logged == pytest.approx(seen, rel=1e-12)
        assert len(logged) == 2


class TestChecks:
    def test_what_the_first_phase_costs_is_logged(self, tmp_path, caplog):
        for name in ("sigmoid", "aot"):
            caplog.clear()
            with caplog.at_level(logging.INFO):
                make_trainer(tmp_path, options={"loss_type": name, "max_steps": 1}).train()
            found = [record for record in caplog.records if "couples the pairs" in record.message]
            assert len(found) == (name == "aot")

    def test_tokens_count_once(self, tmp_path):
        counts = []
        for name in ("sigmoid", "aot"):
            trainer = make_trainer(tmp_path / name, options={"loss_type": name, "max_steps": 2})
            trainer.train()
            log = trainer.state.log_history[1]
            counts.append([log[key] for key in ("num_tokens", "lengths/pair", "lengths/row")])
        assert counts[0] == counts[1]

    def test_a_wrong_reference_is_found_at_step_0(self, tmp_path):
        trainer = make_trainer(tmp_path, options={"loss_type": "aot"})
        trainer.score_datasets()
        with torch.no_grad():
            next(trainer.model.parameters()).mul_(1.5)
        with pytest.raises(ModelError, match=r"which gives 0\.693147"):
            trainer.train()

    def test_a_nan_ends_the_run_within_the_step(self, tmp_path):
        class Broken(TrainerCallback):
            def on_step_begin(self, args, state, control, model=None, **kwargs):
                if state.global_step == 1:
                    with torch.no_grad():
                        model.model.norm.weight[0] = torch.nan

        trainer = make_trainer(tmp_path, options={"loss_type": "aot"}, callbacks=[Broken()])
        with pytest.raises(NonFiniteError, match=r"^Step 2: .*norm"):
            trainer.train()

    def test_a_function_that_has_no_derivative_ends_the_run(self, tmp_path):
        steps = []

        def steep(chosen, rejected, lengths):
            losses = neighbours(chosen, rejected, lengths)
            # The square root of 0 has an infinite derivative.
            return losses + (chosen - chosen.detach()).abs().sqrt() if steps else losses

        trainer = make_trainer(tmp_path, loss_fn=CoupledFunction(steep))
        steps.append(1)
        with pytest.raises(NonFiniteError, match=r"^Step 1: "):
            trainer.train()

    def test_what_a_function_returns_later_is_checked_too(self, tmp_path):
        later = []

        def changing(chosen, rejected, lengths):
            losses = neighbours(chosen, rejected, lengths)
            return losses.mean() if later else losses

        trainer = make_trainer(tmp_path, loss_fn=CoupledFunction(changing))
        assert trainer.loss_fn == CoupledFunction(changing)
        assert trainer.loss_types == ["custom"]
        later.append(1)
        with pytest.raises(ConfigError, match=r"^loss_fn: it returned \[\] torch.float64 for 4"):
            trainer.train()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"f_divergence_type": "forward_kl"}, "^f_divergence_type: The aot loss has no other"),
            ({"label_smoothing": 0.6}, "^label_smoothing is 0.6"),
            ({"use_weighting": True}, "^use_weighting"),
        ],
    )
    def test_options_that_it_has_not_are_refused(self, tmp_path, options, message):
        with pytest.raises(ConfigError, match=message):
            make_trainer(tmp_path, options={"loss_type": "aot", **options})
