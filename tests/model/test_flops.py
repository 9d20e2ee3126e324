"""The operations of a step, against PyTorch's own counter; attention against a count by hand."""

from __future__ import annotations

import sys
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dpofast.data.packing.collate import Layout
from dpofast.model.checks import check_layout
from dpofast.model.flops import PASSES_TRAINED, TrainingFlops, causal_scores, peak_flops
from dpofast.model.forward import micro_batch, run_batch
from dpofast.model.head import ScoreTask, head_options
from dpofast.model.layer_sizes import UnknownSizesError
from dpofast.model.parts import body_of
from dpofast.model.unreached import reached_modules
from dpofast_kernels.attention import attends
from dpofast_kernels.head.workspace import ROWS_AT_A_TIME
from tests.families import FAMILIES, tiny_model
from tests.newer_families import NEWER_PADDED
from tests.recurrences import RECURRENCES
from tests.support import float64_throughout, tiny_llama

SEQUENCES = [([5, 6, 7], [8, 9]), ([5, 6, 7], [10, 11, 12, 13])]


def counted(model, batch):
    """Operations of forward and backward that PyTorch counts, without those of attention."""
    task = ScoreTask(batch.labels, head_options(model.config))
    with FlopCounterMode(display=False) as counter, micro_batch(model, batch):
        run_batch(model, batch, task).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for op, count in counts.items() if "attention" not in str(op))


@pytest.mark.parametrize("frozen", [(), ("q_proj", "down_proj"), ("lm_head",)])
def test_products_are_those_that_pytorch_counts(frozen):
    model = tiny_llama(attn_implementation="sdpa")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    batch = Layout("padded").collate(SEQUENCES)
    expected = TrainingFlops(model)
    expected.per_score = {}
    num_scored = batch.labels.numel()
    # `linear_logps` computes its logits again in the backward, which we don't count as work
    again = 2 * num_scored * model.lm_head.weight.numel()
    # nor do we count padding: that of the body, and that of a CPU's logits, computed twice
    padding = (batch.num_body_tokens - batch.num_tokens) * expected.per_token
    padding += 2 * 2 * (-num_scored % ROWS_AT_A_TIME) * model.lm_head.weight.numel()
    # some releases of transformers compute RoPE's angles by a tiny product
    assert counted(model, batch) == pytest.approx(expected.of(batch) + again + padding, rel=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "llama4"])
def test_a_mixture_counts_the_experts_that_a_token_goes_through(family):
    """Half of them, and all of a shared expert."""
    model = tiny_model(family)
    dense = sum(
        parameter.numel() * (0.5 if ".experts." in name else 1.0)
        for name, parameter in model.model.named_parameters()
        if parameter.dim() > 1 and "embed" not in name
    )
    assert TrainingFlops(model).per_token == 6 * dense


def forward_flops(model, num_tokens):
    """Operations that PyTorch counts in a forward pass of the body, attention included.

    Recurrences run token by token, and give what transformers' functions do.
    """
    body, input_ids = body_of(model), torch.arange(num_tokens)[None]
    home = sys.modules[type(model).__module__]
    functions = {name: each for name, each in RECURRENCES.items() if hasattr(home, name)}
    with torch.no_grad(), float64_throughout():
        expected = body(input_ids=input_ids, use_cache=False)[0]
        with mock.patch.dict(vars(home), functions), FlopCounterMode(display=False) as counter:
            found = body(input_ids=input_ids, use_cache=False)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    return counter.get_total_flops()


# A token's products that don't count. Gemma 3n mixes four streams of 32 in each of its four layers,
# by products of 4 x 4 and 4 x 1 that hold no weights. Beside the products of a real model they are
# nothing. Llama 4 multiplies zeros with the experts that a token hasn't chosen: one of two here,
# three matrices of 32 x 48 in one layer.
UNCOUNTED = {
    **dict.fromkeys(("gemma3n", "gemma3n with pictures"), 2 * 4 * (16 + 4) * 32),
    **dict.fromkeys(("llama4", "llama4 with temperature"), 2 * 3 * 32 * 48),
}


def check_forward(family):
    # transformers' XGLM fits a mask for float32 only
    dtype = torch.float32 if family == "xglm" else torch.float64
    model, num_tokens = tiny_model(family).to(dtype).eval(), 16
    expected = TrainingFlops(model)
    scores = num_tokens**2  # eager attention multiplies masked scores as well
    per_token = expected.per_token + PASSES_TRAINED * UNCOUNTED.get(family, 0)
    count = per_token * num_tokens + sum(expected.per_score.values()) * scores
    # a causal convolution also runs at the ends of its padding, whose results are cut off
    count += PASSES_TRAINED * sum(
        2 * module.weight.numel() * (module.kernel_size[0] - 1)
        for _, module in reached_modules(body_of(model))
        if isinstance(module, nn.Conv1d)
    )
    assert forward_flops(model, num_tokens) == pytest.approx(count / PASSES_TRAINED, rel=1e-3)


# Layers of different sizes, keys shared by layers, latent attention, and each way to hold experts.
UNEVEN = ["gemma3n", "gemma4", "gemma4 with experts", "gpt_oss", "jetmoe", "deepseek_v3"]
OTHER_WAYS = ["mimo_v2_flash", "opt, norms last", "lfm2", "laguna", "phi4_multimodal", "llama4"]
STATEFUL = ["falcon_h1", "qwen3_5"]
# Layers that do work of their own kind, and experts that do nothing.
UNKNOWN = {
    "minimax",
    "mamba",
    "jamba",
    "longcat_flash",
}
# ... which run several times, attend in a way of their own, or hold all experts in one matrix
UNKNOWN |= {"dbrx", "diffllama", "hrm", *NEWER_PADDED}
UNKNOWN -= {"gpt_neox_japanese", "moshi", "openai-gpt"}


@pytest.mark.parametrize("family", [*UNEVEN, *OTHER_WAYS, *STATEFUL])
def test_a_forward_pass_has_the_operations_that_pytorch_counts(family):
    check_forward(family)


@pytest.mark.slow  # a model of every family
@pytest.mark.parametrize("family", sorted({*FAMILIES} - UNKNOWN))
def test_so_has_that_of_every_family(family):
    check_forward(family)


@pytest.mark.parametrize("family", sorted(UNKNOWN))
def test_a_family_whose_work_is_not_known_has_no_count(family):
    with pytest.raises(UnknownSizesError):
        TrainingFlops(tiny_model(family))


@pytest.mark.parametrize("window", [None, 1, 3, 6, 50])
@pytest.mark.parametrize("chunk", [None, 1, 4, 9, 50])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (3, 9), (1, 1), (1, 12), (0, 3), (6, 21)])
def test_scores_of_a_segment(queries, keys, chunk, window):
    sees = [
        sum(
            key // (chunk or keys) == query // (chunk or keys) and query - key < (window or keys)
            for key in range(query + 1)
        )
        for query in range(keys - queries, keys)
    ]
    assert causal_scores(queries, keys, window, chunk) == sum(sees)


@pytest.mark.parametrize("layout", ["shared", "unshared"])
@pytest.mark.parametrize("family", ["gemma3", "llama4 with temperature"])
def test_attention_of_a_row_counts_the_pairs_that_its_layers_see(family, layout):
    long = [([*range(5, 18)], [*range(20, 20 + answer)]) for answer in (4, 9)]
    model, batch = tiny_model(family), Layout(layout).collate([*SEQUENCES, *long])
    flops = TrainingFlops(model)
    calls = check_layout(Layout(layout), model.double())
    attention = sum(
        int(attends(batch.shared_layout, each.window, each.chunk).sum())
        * (2 * PASSES_TRAINED * each.num_heads * (each.head_dim + each.value_dim))
        for each in calls
    )
    assert len({(each.window, each.chunk) for each in calls}) == 2
    products = flops.per_token * batch.num_body_tokens + flops.per_scored * len(batch.labels)
    assert flops.of(batch) == products + attention


def test_attention_of_shared_rows_is_less_than_that_of_separate_ones():
    model = tiny_llama()
    flops = TrainingFlops(model)
    shared, unshared = (flops.of(Layout(n).collate(SEQUENCES)) for n in ("shared", "unshared"))
    tokens, scores = 3, 1 + 2 + 3  # those of the prompt, which the shared row has only once
    # two layers of 4 heads of 8; 12 operations for each element of a head
    assert unshared - shared == tokens * flops.per_token + 2 * scores * 12 * 4 * 8


@pytest.mark.parametrize("name", ["shared", "padded"])
def test_an_answer_of_several_pairs_counts_once(name):
    flops = TrainingFlops(tiny_llama())
    once, again = (Layout(name).collate(SEQUENCES, counts=counts) for counts in (None, [3, 2]))
    assert again.num_tokens == 3 * 5 + 2 * 7 > once.num_tokens
    assert flops.of(again) == flops.of(once)


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H200", torch.float16, 989e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, None),
        ("Something else", torch.bfloat16, None),
    ],
)
def test_peaks_by_name(monkeypatch, name, dtype, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda"), dtype) == expected
    assert peak_flops(torch.device("cpu"), dtype) is None
