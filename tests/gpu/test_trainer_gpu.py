"""A short training run on a GPU, in float32 and in bfloat16."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dpofast.data.packing.collate import Layout
from dpofast.model.scorer import SequenceScorer
from tests.support import make_trainer, tiny_llama, token_pairs, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-3), (True, 0.1)])
@pytest.mark.parametrize("head_backend", ["auto", "triton", "torch"])
def test_a_gpu_trains_as_the_cpu(tmp_path, head_backend, bf16, tolerance):
    pairs = token_pairs(10)
    expected = train(make_trainer(tmp_path / "cpu", pairs=pairs))
    options = {"use_cpu": False, "bf16": bf16, "gradient_checkpointing": True}
    options["head_backend"] = head_backend
    trainer = make_trainer(tmp_path / "gpu", tiny_llama(), pairs, options=options)
    got = train(trainer)
    assert next(trainer.model.parameters()).is_cuda
    assert got[0][0] == pytest.approx(math.log(2), abs=2e-2)
    np.testing.assert_allclose([x[0] for x in got], [x[0] for x in expected], rtol=tolerance)


def test_scores_that_are_fetched_later_are_those_of_a_cpu():
    model, layout = tiny_llama().eval(), Layout("padded")
    rows = [[(pair["prompt_ids"], pair["chosen_ids"])] for pair in token_pairs(6)]
    expected = [SequenceScorer(model, torch.no_grad, layout, True)(row) for row in rows]
    scorer = SequenceScorer(model.cuda(), torch.no_grad, layout, True)
    started = [scorer.launch(row) for row in rows]  # all, before the first one is read
    for fetch, wanted in zip(started, expected, strict=True):
        for got, values in zip(fetch(), wanted, strict=True):
            assert got.dtype == np.float64
            np.testing.assert_allclose(got, values, rtol=1e-3, atol=1e-3)
