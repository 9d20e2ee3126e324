"""The gather of keys and its backward, compared with PyTorch's index_add."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dpofast_kernels.attention import build_layout
from dpofast_kernels.attention.gather import gather_keys
from tests.kernels.attention.cases import GROUPS, MANY_TAILS, Groups, real_groups

CASES = {
    "30 real pairs": real_groups(30),
    "hard cases": GROUPS,
    "many tails": MANY_TAILS,
    "real prompts, five tails": [
        (prompt, (*tails, *tails, 3)) for prompt, tails in real_groups(10, skip=30)
    ],
}


@pytest.fixture
def two_threads(one_thread: None) -> Iterator[None]:
    """With two threads, colliding writes to one token would show."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("groups", CASES.values(), ids=CASES)
def test_gradient_equals_index_add(groups: Groups):
    layout = build_layout(groups)
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    states = torch.randn(layout.num_tokens, 2, 16, **options).requires_grad_()
    d_gathered = torch.randn(len(layout.key_tokens), 2, 16, **options)
    gathered = gather_keys(states, layout)
    assert torch.equal(gathered, states.detach()[layout.key_tokens])
    (got,) = torch.autograd.grad(gathered, states, d_gathered, retain_graph=True)
    expected = torch.zeros_like(states).index_add(0, layout.key_tokens, d_gathered)
    assert (got - expected).abs().max().item() <= 1e-12
    (again,) = torch.autograd.grad(gathered, states, d_gathered)
    assert torch.equal(got, again)


def test_gathers_nothing_where_nothing_is_shared():
    layout = build_layout([(3, (2,)), (4, (0,)), (1, (0, 5))])
    states = torch.randn(layout.num_tokens, 1, 2)
    assert gather_keys(states, layout) is states
