"""WPO's weights of pairs, from sums of aligned log-probs."""

from __future__ import annotations

import math

import pytest
import torch

from dpofast_kernels import PairWeighting

LENGTHS = torch.tensor([[2, 4], [1, 3], [5, 5]])


def doubles(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_the_weight_is_the_product_of_exponentials_of_means():
    sums = doubles((-1.0, 2.0), (0.3, -6.0), (-5000.0, -5000.0))
    expected = [
        math.exp(chosen / num_chosen) * math.exp(rejected / num_rejected)
        for (chosen, rejected), (num_chosen, num_rejected) in zip(sums, LENGTHS, strict=True)
    ]
    found = PairWeighting().weights(sums, LENGTHS)
    torch.testing.assert_close(found, doubles(*expected), rtol=1e-14, atol=0)
    assert found[2] == 0.0  # and no NaN


def test_no_gradient_goes_through_it():
    sums = doubles((-1.0, 2.0), (0.3, -6.0), (0.0, 0.0)).requires_grad_()
    assert not PairWeighting(0.5).weights(sums, LENGTHS).requires_grad


def test_the_clamp_is_that_of_the_pair():
    """As in the authors' code: an answer of a large w makes up for one of a small w."""
    sums = doubles((2.0, -4.0), (1.0, 3.0), (5.0, 0.0))
    found = PairWeighting(1.5).weights(sums, LENGTHS)
    torch.testing.assert_close(found, doubles(1.0, 1.5, 1.5), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("clamp", "error"),
    [*((each, ValueError) for each in (0.0, -1.0, math.inf, math.nan)), ("1", TypeError)],
)
def test_clamps_out_of_range(clamp, error):
    with pytest.raises(error, match="clamp is"):
        PairWeighting(clamp)
