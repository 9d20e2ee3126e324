"""Liger's kernels against the stock layers on a GPU, and a training run with them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("liger_kernel", reason="needs liger-kernel")

from dpofast.data.packing.collate import Layout
from dpofast.model.checks import check_liger
from dpofast.model.head import PairLossTask, head_options
from dpofast.model.liger import liger_names, use_liger
from dpofast.model.recurrent import needs_device
from dpofast_kernels import make_loss
from tests.exactness import SHORT, Outcome, run_task
from tests.families import tiny_model
from tests.liger import KINDS
from tests.support import make_trainer, token_pairs, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

FAMILIES = ("llama", "qwen3", "gemma2", "phi3", "olmo2")
# In bfloat16, rounding changes the experts that tokens get, and grows in the recurrence.
ONLY_FLOAT32 = ("mixtral", "gpt_oss", "qwen3_5")
# Most that Liger's error may exceed that of the stock layers: both round as their dtype does, in
# other places.
ALLOWANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def outcome(model, layout, device) -> Outcome:
    """One micro-batch, forward and backward."""
    model.zero_grad()
    batch = Layout(layout).collate(SHORT.sequences, SHORT.ref_logps).to(device)
    loss, options = make_loss("sigmoid"), head_options(model.config)
    task = PairLossTask(batch.labels, batch.bounds, batch.ref_logps, loss, options)
    return Outcome(model, *run_task(model, batch, task))


def error(found: Outcome, truth: Outcome) -> tuple[float, float]:
    """Relative errors of the hidden states and of the gradients, against float64 on a CPU."""

    def relative(got, expected):
        got, expected = got.double().cpu(), expected.double().cpu()
        return float((got - expected).norm() / expected.norm())

    flat = [torch.cat([g.flatten().cpu() for g in o.gradients.values()]) for o in (found, truth)]
    return relative(found.hidden_states, truth.hidden_states), relative(*flat)


@pytest.mark.parametrize(
    ("family", "layout", "dtype"),
    [
        *(("llama", "shared", dtype) for dtype in ALLOWANCE),
        *((family, "padded", dtype) for family in FAMILIES for dtype in ALLOWANCE),
        *((family, "padded", torch.float32) for family in ONLY_FLOAT32),
    ],
)
def test_as_exact_as_the_stock_layers(family, layout, dtype):
    model = tiny_model(family).to(dtype)
    if needs_device(model, torch.device("cuda")):
        pytest.skip("its kernels are installed, so it can't run on the CPU")
    truth = outcome(copy.deepcopy(model).double(), layout, "cpu")
    model.cuda()
    stock = error(outcome(model, layout, "cuda"), truth)
    use_liger(model, KINDS)
    assert "LigerRMSNorm" in liger_names(model)
    check_liger(model)
    ligers = error(outcome(model, layout, "cuda"), truth)
    for mine, theirs in zip(ligers, stock, strict=True):
        assert mine <= 1.5 * theirs + ALLOWANCE[dtype]


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-3), (True, 0.1)])
def test_it_trains_as_without(tmp_path, bf16, tolerance):
    pairs, options = token_pairs(10), {"use_cpu": False, "bf16": bf16}
    expected = train(make_trainer(tmp_path / "stock", pairs=pairs, options=options))
    options["use_liger_kernel"] = True
    made = make_trainer(tmp_path / "liger", pairs=pairs, options=options)
    got = train(made)
    assert "LigerRMSNorm" in made.reference.identity.description["layers"]
    np.testing.assert_allclose([x[0] for x in got], [x[0] for x in expected], rtol=tolerance)
