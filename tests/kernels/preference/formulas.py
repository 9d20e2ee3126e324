"""The losses as docs/losses.md has them, without derivatives, and log-ratios to try them on."""

from __future__ import annotations

import math

import torch


def softplus(x):
    return torch.logaddexp(x, torch.zeros_like(x))


def sigmoid(x):
    return torch.exp(-softplus(-x))


def plain_formula(loss, a, b, lengths):
    """[P]: the losses as the table of docs/losses.md has them, with log-ratios a and b [P]."""
    beta, e, z = loss.beta, loss.label_smoothing, loss.beta * (a - b)
    mean_difference = a / lengths[:, 0] - b / lengths[:, 1]
    norm = beta * mean_difference
    if loss.name == "exo_pair":
        q, p = sigmoid(z), sigmoid(-z)
        return q * (-softplus(-z) - math.log1p(-e)) + p * (-softplus(z) - math.log(e))
    if loss.name == "discopop":
        m = z / loss.discopop_tau
        return softplus(-z) * sigmoid(-m) + torch.exp(-z - softplus(-m))
    if loss.name == "alphapo":
        norm = beta * (
            alpha_reward(a / lengths[:, 0], loss) - alpha_reward(b / lengths[:, 1], loss)
        )
    if loss.name in ("simpo", "alphapo"):
        margin = norm - loss.simpo_gamma
        return (1 - e) * softplus(-margin) + e * softplus(margin)
    if loss.name == "orpo":
        return beta * softplus(log_odds(b / lengths[:, 1]) - log_odds(a / lengths[:, 0]))
    if loss.name == "dpop":
        return softplus(-beta * (a - b - loss.dpop_lambda * torch.relu(-a)))
    return {
        "cpo": lambda: (1 - e) * softplus(-z) + e * softplus(z),
        "cpo_hinge": lambda: torch.relu(1 - z),
        "cpo_ipo": lambda: (mean_difference - 1 / (2 * beta)) ** 2,
        "sigmoid": lambda: (1 - e) * softplus(-z) + e * softplus(z),
        "sigmoid_norm": lambda: (1 - e) * softplus(-norm) + e * softplus(norm),
        "hinge": lambda: torch.relu(1 - z),
        "ipo": lambda: (mean_difference - 1 / (2 * beta)) ** 2,
        "robust": lambda: ((1 - e) * softplus(-z) - e * softplus(z)) / (1 - 2 * e),
        "apo_zero": lambda: sigmoid(-beta * a) + sigmoid(beta * b),
        "apo_down": lambda: sigmoid(beta * a) + sigmoid(-z),
        "nca_pair": lambda: softplus(-beta * a) + softplus(beta * a) / 2 + softplus(beta * b) / 2,
        "bco_pair": lambda: softplus(-beta * a) + softplus(beta * b),
        "sppo_hard": lambda: (a - 1 / (2 * beta)) ** 2 + (b + 1 / (2 * beta)) ** 2,
    }[loss.name]()


def alpha_reward(mean_logp, loss):
    if not loss.alpha:
        return mean_logp
    return -torch.expm1((-loss.alpha * mean_logp).clamp(max=80)) / loss.alpha


def log_odds(mean_logp):
    mean_logp = mean_logp.clamp(max=-(2.0**-40))
    return mean_logp - torch.log(-torch.expm1(mean_logp))


def inputs_of(loss):
    """What the loss is tried on: log-ratios, or for a loss without a reference log-probs."""
    chosen, rejected, lengths = log_ratios()
    if loss.is_reference_free:
        return -chosen.abs(), -rejected.abs() - 0.1, lengths
    return chosen, rejected, lengths


def log_ratios():
    """Log-ratios [P] each, ordinary and extreme ones, and lengths [P, 2]."""
    grid = torch.tensor([-1e4, -750.0, -37.0, -1.3, 0.0, 1e-12, 0.7, 40.0, 720.0, 1e4]).double()
    chosen, rejected = (side.flatten() for side in torch.meshgrid(grid, grid, indexing="ij"))
    lengths = torch.arange(1, 2 * len(chosen) + 1).view(-1, 2)
    return chosen, rejected, lengths
