"""Formulas of losses that couple pairs, and runs whose gradients are kept."""

from __future__ import annotations

import torch.nn.functional as F
from transformers import TrainerCallback

from dpofast import DPOTrainer
from tests.support import (
    BETA,
    float64_throughout,
    make_trainer,
    tiny_llama,
)


def logistic(margins, smoothing=0.0):
    return -(1 - smoothing) * F.logsigmoid(margins) - smoothing * F.logsigmoid(-margins)


def aot(chosen, rejected, ref_chosen, ref_rejected, lengths):
    better, worse = (chosen - rejected).sort()[0], (ref_chosen - ref_rejected).sort()[0]
    return logistic(BETA * (better - worse), 0.1)


def aot_unpaired(chosen, rejected, ref_chosen, ref_rejected, lengths):
    better, worse = (chosen - ref_chosen).sort()[0], (rejected - ref_rejected).sort()[0]
    return logistic(BETA * (better - worse))


def mixed(*columns):
    chosen, rejected, ref_chosen, ref_rejected, lengths = columns
    margins = (chosen - ref_chosen) / lengths[:, 0] - (rejected - ref_rejected) / lengths[:, 1]
    return 0.5 * aot_unpaired(*columns) + 0.25 * (margins - 0.5 / BETA).square()


def neighbours(chosen, rejected, lengths):
    """Depends on the order of the pairs."""
    margins = chosen / lengths[:, 0] - rejected / lengths[:, 1]
    return logistic(3 * margins - margins.roll(1).tanh())


def of_neighbours(chosen, rejected, ref_chosen, ref_rejected, lengths):
    return neighbours(chosen - ref_chosen, rejected - ref_rejected, lengths)


# Options of a run, and the formula of all pairs of its steps.


class Gradients(TrainerCallback):
    """Keeps the gradients of the last step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.grads = [p.grad.clone() for p in model.parameters()]


def first_gradients(folder, options, given, model=None, **more):
    """The gradients of a run's second step, in which policy and reference differ, and the run."""
    kept = Gradients()
    options = {"max_grad_norm": 0.0, "max_steps": 2, "optim": "sgd", **options}
    with float64_throughout():
        model = (tiny_llama() if model is None else model).double()
        trainer = make_trainer(folder, model, options=options, callbacks=[kept], **given, **more)
        trainer.train()
    return kept.grads, trainer


class Doubled(DPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return (2 * loss, outputs) if return_outputs else 2 * loss
