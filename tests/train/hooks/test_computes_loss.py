"""Overrides of compute_loss and prediction_step: what they get, and what becomes of their loss."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

from dpofast import DPOTrainer
from dpofast.errors import ConfigError, DPOFastError
from dpofast.train.hooks import computes_loss
from tests.support import float64_throughout, make_trainer, tiny_llama, token_pairs

STEP = {"max_steps": 1, "max_grad_norm": 0.0, "max_tokens_per_microbatch": 60}


class Gradients(TrainerCallback):
    """Keeps the gradients of the last step, and the weights before it."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.grads = [p.grad.clone() for p in model.parameters()]
        self.weights = [p.detach().clone() for p in model.parameters()]


def one_step(folder, trainer_class=DPOTrainer, **given):
    """Train one step in float64: the gradients, the weights before it, and the trainer."""
    kept = Gradients()
    options = {**STEP, **given.pop("options", {})}
    with float64_throughout():
        trainer = make_trainer(
            folder,
            tiny_llama().double(),
            options=options,
            trainer_class=trainer_class,
            callbacks=[kept],
            **given,
        )
        trainer.train()
    return kept, trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return one_step(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """For runs that end with an error in their first step."""
    folder = tmp_path_factory.mktemp("trainer")
    return make_trainer(folder, options={"max_steps": 1}, eval_dataset=token_pairs(3, seed=4))


class Doubled(DPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return (2 * loss, outputs) if return_outputs else 2 * loss


class Penalised(DPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False):  # the signature of old scripts
        result = super().compute_loss(model, inputs, return_outputs)
        loss = result[0] if return_outputs else result
        loss = loss + 0.1 * sum(p.square().sum() for p in model.parameters())
        return (loss, result[1]) if return_outputs else loss


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_twice_the_loss_has_exactly_twice_the_gradients(tmp_path, plain, layout):
    options = {"layout": layout}
    expected = plain[0] if layout == "shared" else one_step(tmp_path / "1", options=options)[0]
    found, trainer = one_step(tmp_path, Doubled, options=options)
    assert all(map(torch.equal, found.grads, [2 * grad for grad in expected.grads]))
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(2 * plain[1].state.log_history[0]["loss"], rel=1e-12)
    assert logged["rewards/margins"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("tokens", [60, 10_000])
def test_a_penalty_counts_once_for_each_step(tmp_path, plain, tokens):
    found, trainer = one_step(tmp_path, Penalised, options={"max_tokens_per_microbatch": tokens})
    train_set = trainer.train_set()
    assert (len(train_set.plan.step(0).micro_batches) > 1) is (tokens == 60)
    for grad, expected, weight in zip(found.grads, plain[0].grads, found.weights, strict=True):
        torch.testing.assert_close(grad - expected, 0.2 * weight, rtol=1e-9, atol=1e-12)
    penalty = 0.1 * sum(weight.square().sum().item() for weight in found.weights)
    losses = [each.state.log_history[0]["loss"] for each in (trainer, plain[1])]
    assert losses[0] - losses[1] == pytest.approx(penalty, rel=1e-9)


def test_evaluation_measures_the_overridden_loss(tmp_path):
    class Shifted(DPOTrainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            loss, *more = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            return loss + 1, *more

    pairs = token_pairs(5, seed=4)
    options = {"per_device_eval_batch_size": 2, "max_tokens_per_microbatch": 30}
    losses = [
        make_trainer(tmp_path, trainer_class=kind, eval_dataset=pairs, options=options).evaluate()
        for kind in (DPOTrainer, Doubled, Shifted)
    ]
    plain = losses[0]["eval_loss"]
    assert losses[1]["eval_loss"] == pytest.approx(2 * plain, rel=1e-12)
    assert losses[2]["eval_loss"] == pytest.approx(plain + 1, rel=1e-12)
    assert losses[1]["eval_logps/chosen"] == losses[0]["eval_logps/chosen"]


def test_an_override_that_never_calls_ours_trains_its_own_loss(tmp_path):
    class Decay(DPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return sum(p.square().sum() for p in model.parameters())

    found, trainer = one_step(tmp_path, Decay)
    for grad, weight in zip(found.grads, found.weights, strict=True):
        torch.testing.assert_close(grad, 2 * weight, rtol=1e-12, atol=1e-12)
    assert "rewards/margins" not in trainer.state.log_history[0]
    assert trainer.state.log_history[0]["loss"] > 10


def test_the_loss_is_computed_inside_the_context_manager(tmp_path):
    entered = []

    class Own(DPOTrainer):
        @contextlib.contextmanager
        def compute_loss_context_manager(self):
            entered.append(True)
            yield
            entered.append(False)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            assert entered[-1]
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    trainer = make_trainer(
        tmp_path, trainer_class=Own, options={"max_steps": 1}, eval_dataset=token_pairs(2)
    )
    trainer.train()
    trainer.evaluate()
    assert len(entered) >= 4
    assert not entered[-1]


def test_an_assigned_compute_loss_is_called(trainer, monkeypatch):
    def own(model, inputs, return_outputs=False):
        raise RuntimeError("reached")

    monkeypatch.setitem(vars(trainer), "compute_loss", own)
    with pytest.raises(RuntimeError, match="reached"):
        trainer.train()


DICT_CODE = {
    "item": lambda model, inputs: inputs["chosen_input_ids"],
    "keywords": lambda model, inputs: dict(**inputs),
    "forward": lambda model, inputs: model(**inputs),
    "pop": lambda model, inputs: inputs.pop("labels"),
    "get": lambda model, inputs: inputs.get("labels"),
    "loop": lambda model, inputs: [name for name in inputs],  # noqa: C416
    "in": lambda model, inputs: "labels" in inputs,
    "items": lambda model, inputs: inputs.items(),
    "copy": lambda model, inputs: {**inputs},
    "assignment": lambda model, inputs: inputs.__setitem__("labels", 0),
}


@pytest.mark.parametrize("code", DICT_CODE.values(), ids=DICT_CODE)
@pytest.mark.parametrize("hook", ["compute_loss", "training_step"])
def test_a_batch_taken_for_trls_dict_is_one_clear_error(trainer, monkeypatch, code, hook):
    monkeypatch.setitem(vars(trainer), hook, lambda model, inputs, *args, **kw: code(model, inputs))
    with pytest.raises(ConfigError, match=r"no dict of padded tensors here.*docs/extending\.md"):
        trainer.train()


def test_the_models_own_forward_inside_compute_loss_is_a_clear_error(trainer, monkeypatch):
    def own(model, inputs, return_outputs=False):
        return model(input_ids=inputs.input_ids, labels=inputs.input_ids).loss

    monkeypatch.setitem(vars(trainer), "compute_loss", own)
    with pytest.raises(DPOFastError, match="own forward can't run inside compute_loss"):
        trainer.train()


RETURNED = {
    "nothing": (lambda loss, output: None, "a NoneType"),
    "pair": (lambda loss, output: (loss, output), "a tuple"),
    "vector": (lambda loss, output: loss[None], r"a tensor \[1\]"),
    "detached": (lambda loss, output: loss.detach(), r"a tensor \[\] without a gradient"),
}


@pytest.mark.parametrize(("of", "got"), RETURNED.values(), ids=RETURNED)
def test_what_is_no_loss_is_named(trainer, monkeypatch, of, got):
    def own(model, inputs, return_outputs=False):
        return of(*DPOTrainer.compute_loss(trainer, model, inputs, return_outputs=True))

    monkeypatch.setitem(vars(trainer), "compute_loss", own)
    with pytest.raises(ConfigError, match=f"compute_loss.*returned {got}, expected the mean loss"):
        trainer.train()


def test_evaluation_without_outputs_is_named(trainer, monkeypatch):
    def own(model, inputs, return_outputs=False):
        return DPOTrainer.compute_loss(trainer, model, inputs)

    monkeypatch.setitem(vars(trainer), "compute_loss", own)
    with pytest.raises(ConfigError, match=r"expects \(loss, outputs\), but got a Tensor"):
        trainer.evaluate()


@pytest.mark.parametrize(("loss", "got"), [(torch.ones(3), r"\[3\]"), (0.5, "float")])
def test_an_evaluation_loss_of_another_kind_is_named(trainer, monkeypatch, loss, got):
    monkeypatch.setitem(vars(trainer), "prediction_step", lambda *args, **kw: (loss, None, None))
    with pytest.raises(ConfigError, match=f"prediction_step, .* is {got}, expected the mean loss"):
        trainer.evaluate()


@pytest.mark.parametrize("hook", ["get_train_dataloader", "get_eval_dataloader"])
def test_a_loader_of_something_else_is_named(trainer, monkeypatch, hook):
    loader = torch.utils.data.DataLoader([{"input_ids": 1}] * 4, batch_size=2)
    monkeypatch.setitem(vars(trainer), hook, lambda *args: loader)
    call = trainer.train if hook == "get_train_dataloader" else trainer.evaluate
    with pytest.raises(ConfigError, match=f"{hook}: an item of the loader is a dict"):
        call()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compute_loss_of_a_loaders_item_has_the_steps_gradient(tmp_path, plain, checkpointing):
    """The backward comes after compute_loss, where activations can't be computed again."""
    options = {**STEP, "gradient_checkpointing": checkpointing}
    with float64_throughout():
        trainer = make_trainer(tmp_path, tiny_llama().double(), options=options)
        if checkpointing:
            trainer.model.gradient_checkpointing_enable()
        trainer.model.train()
        batch = next(iter(trainer.get_train_dataloader()))
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        loss.backward()
    assert len(batch.micro_batches) > 1
    assert outputs.logps.shape == (8,)
    assert loss.item() == pytest.approx(plain[1].state.log_history[0]["loss"], rel=1e-12)
    for parameter, expected in zip(trainer.model.parameters(), plain[0].grads, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-14)
    assert trainer.model.is_gradient_checkpointing is checkpointing
    single = [trainer.compute_loss(trainer.model, each) for each in batch.micro_batches]
    shares = [each.num_pairs / batch.num_pairs for each in batch.micro_batches]
    mean = sum(value.item() * share for value, share in zip(single, shares, strict=True))
    assert mean == pytest.approx(loss.item(), rel=1e-6)
    with pytest.raises(ConfigError, match=r"compute_loss: got a dict, expected an item"):
        trainer.compute_loss(trainer.model, {"input_ids": 1})


def test_a_training_step_of_ones_own_trains_and_is_measured(tmp_path, plain):
    class Own(DPOTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss = self.compute_loss(model, inputs)
            self.accelerator.backward(loss)
            return loss.detach()

    found, trainer = one_step(tmp_path, Own)
    for grad, expected in zip(found.grads, plain[0].grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-14)
    logs = [each.state.log_history[0] for each in (trainer, plain[1])]
    for name in ("loss", "logps/chosen", "rewards/accuracies"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-12)


@pytest.mark.parametrize("hook", ["compute_loss", "compute_pair_loss"])
@pytest.mark.parametrize("name", ["logps", "metrics"])
def test_a_term_that_could_not_be_trained_is_refused(tmp_path, hook, name):
    """A likelihood term, for instance: the log would show it, and no gradient would have it."""

    class Own(DPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            if hook == "compute_loss":
                loss = loss - getattr(outputs, name).mean()
            return (loss, outputs) if return_outputs else loss

        def compute_pair_loss(self, model, batch, sums):
            output = super().compute_pair_loss(model, batch, sums)
            if hook == "compute_loss":
                return output
            return replace(output, loss=output.loss - getattr(output, name).sum())

    trainer = make_trainer(tmp_path, trainer_class=Own, eval_dataset=token_pairs(3, seed=4))
    with pytest.raises(ConfigError, match=r"^compute_loss: a term .* no gradient.* a loss_fn"):
        trainer.train()
    trainer.evaluate()


def test_outputs_can_be_used_for_anything_else(tmp_path, plain):
    seen = []

    class Own(DPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            seen.append(outputs.logps.detach().numpy())
            weight = outputs.metrics[0].detach().exp().mean()
            loss = loss * (weight / weight)
            return (loss, outputs) if return_outputs else loss

    found, _ = one_step(tmp_path, Own)
    assert seen
    for grad, expected in zip(found.grads, plain[0].grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-14)


def test_steps_copied_from_transformers_may_prepare_their_inputs(tmp_path, plain):
    class Own(DPOTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            inputs = self._prepare_inputs(inputs)
            return super().training_step(model, inputs, num_items_in_batch)

        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            inputs = self._prepare_inputs(inputs)
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    held_out = token_pairs(3, seed=4)
    found, trainer = one_step(tmp_path, Own, eval_dataset=held_out)
    assert all(map(torch.equal, found.grads, plain[0].grads))
    assert "eval_loss" in trainer.evaluate()


@pytest.mark.parametrize("sharded", [True, False])
def test_a_term_of_sharded_weights_is_named(trainer, monkeypatch, sharded):
    """ZeRO-3 gathers a weight between the forward, where it is empty here, and the backward."""
    weight = torch.nn.Parameter(torch.zeros(0))

    def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
        term = weight.square().sum()
        weight.data = torch.zeros(3)
        return term

    monkeypatch.setattr(trainer, "compute_loss", compute_loss)
    monkeypatch.setattr(computes_loss, "spread", lambda parameters: [weight] * sharded)
    kind, message = (ConfigError, "ZeRO-3 .*zero2") if sharded else (RuntimeError, "must match")
    with pytest.raises(kind, match=message):
        trainer.train()
