"""The trainer tells the head the upstream gradient that its backward will get."""

from __future__ import annotations

from dpofast_kernels.head import autograd
from tests.support import make_trainer, train


def test_the_head_multiplies_no_gradient_again(tmp_path, monkeypatch):
    """Steps of 6 pairs in several micro-batches. What the backward gets is what the head expects,
    to the last digit of fp32."""
    factors = []
    rescale = autograd.rescale

    def noted(gradient, factor, *rest):
        factors.append(factor.float().item())
        return rescale(gradient, factor, *rest)

    monkeypatch.setattr(autograd, "rescale", noted)
    options = {"per_device_train_batch_size": 3, "max_tokens_per_microbatch": 64, "max_steps": 2}
    train(make_trainer(tmp_path, options=options))
    assert len(factors) >= 2 * 2 * 2  # of hidden states and weight, of two micro-batches, twice
    assert set(factors) == {1.0}
