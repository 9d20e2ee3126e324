"""The examples in the docstrings of the public ops run and give what they show."""

from __future__ import annotations

import doctest

import pytest

import dpofast_kernels as kernels
from dpofast_kernels import attention

OPS = (
    kernels.linear_logps,
    kernels.linear_scores,
    kernels.linear_statistics,
    kernels.linear_pair_loss,
    kernels.linear_sequence_loss,
    kernels.make_unpaired_loss,
    kernels.sum_per_sequence,
    kernels.make_loss,
    kernels.pair_metrics,
    attention.shared_attention,
    attention.build_layout,
    attention.probe,
)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_example(op):
    (example,) = doctest.DocTestFinder(recurse=False).find(op, globs={})
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
