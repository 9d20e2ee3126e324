"""DeepSpeed's universal checkpoints, as far as dpofast sees to what they leave wrong."""

from __future__ import annotations

import torch

from dpofast.zero.universal import own_steps


def test_states_that_shared_a_step_count_each_count_one_step():
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.AdamW([{"params": [weight]} for weight in weights])
    shared = torch.tensor(5.0)
    for weight in weights:
        weight.grad = torch.ones(2)
        zeros = torch.zeros(2)
        optimizer.state[weight] = {"step": shared, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    own_steps(optimizer)
    optimizer.step()
    assert [float(optimizer.state[weight]["step"]) for weight in weights] == [6.0] * 3
