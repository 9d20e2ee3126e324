"""Metrics of pairs compared with figures worked out by hand."""

from __future__ import annotations

import pytest
import torch

from dpofast_kernels import pair_metrics

LOGPS = torch.tensor([-2.0, -3.5, -8.0, -1.0, -4.0, -4.0]).double()
REF_LOGPS = torch.tensor([-2.3, -3.0, -7.0, -3.0, -5.0, -5.0])
BOUNDS = torch.tensor([0, 2, 3, 7, 8, 9, 12])


def test_worked_figures():
    metrics = pair_metrics(LOGPS, REF_LOGPS, BOUNDS, beta=0.1)
    expected = {
        "rewards/chosen": [0.03, -0.1, 0.1],
        "rewards/rejected": [-0.05, 0.2, 0.1],
        "rewards/margins": [0.08, -0.3, 0.0],
        "rewards/accuracies": [1.0, 0.0, 0.0],  # a tie is wrong
        "logps/chosen": [-2.0, -8.0, -4.0],
        "logps/rejected": [-3.5, -1.0, -4.0],
        "logratios/chosen": [0.15, -0.25, 1.0],
        "logratios/rejected": [-0.5, 2.0, 1.0 / 3.0],
    }
    assert metrics.keys() == expected.keys()
    for name, values in expected.items():
        assert metrics[name].dtype == torch.float64
        assert metrics[name].tolist() == pytest.approx(values, abs=1e-7), name


def test_no_pairs():
    empty = torch.zeros(0).double()
    metrics = pair_metrics(empty, empty, torch.tensor([0]), beta=0.1)
    assert all(value.shape == (0,) for value in metrics.values())


def test_shapes_must_belong_together():
    with pytest.raises(ValueError, match=r"ref_logps \[4\]"):
        pair_metrics(LOGPS, REF_LOGPS[:4], BOUNDS, beta=0.1)
    with pytest.raises(ValueError, match=r"bounds is \[6\], expected \[7\]"):
        pair_metrics(LOGPS, REF_LOGPS, BOUNDS[:-1], beta=0.1)
