"""FlexAttention: the block mask, and the code around the kernel."""

from __future__ import annotations

import contextvars
import gc

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import create_block_mask

from dpofast_kernels.attention import AttentionOptions, attends, build_layout, flex
from dpofast_kernels.attention.chunks import attention_in_chunks
from tests.kernels.attention.cases import (
    GROUPS,
    HEADS,
    MANY_TAILS,
    WINDOWS,
    Groups,
    as_op,
    assert_close,
    make_inputs,
    run,
)

LONG: Groups = ((300, (200, 500)), (17, (0, 40)), (700, (128, 128, 0, 9)), (1, (1, 2)))


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention's definition in PyTorch, with its refusal to run a backward on CPUs lifted."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "compiled_flex", lambda: torch_flex.flex_attention)


@pytest.mark.parametrize("window", [None, 1, 30, 128, 200, 1000])
@pytest.mark.parametrize("groups", [LONG, GROUPS, [(128, (128, 128))]])
def test_block_mask_is_the_one_of_a_dense_mask(groups: Groups, window: int | None):
    layout = build_layout(groups)
    mask, num_tokens = attends(layout, window), layout.num_tokens
    expected = create_block_mask(
        lambda batch, head, query, key: mask[query, key],
        None,
        None,
        num_tokens,
        num_tokens,
        device="cpu",
    )
    got = flex.block_mask(layout, window)
    assert got.seq_lengths == expected.seq_lengths == (num_tokens, num_tokens)
    for of in ("kv", "q", "full_kv", "full_q"):
        for name in (f"{of}_num_blocks", f"{of}_indices"):
            assert torch.equal(getattr(got, name), getattr(expected, name)), name
    tokens = torch.arange(num_tokens)
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(got.mask_mod(zero, zero, tokens[:, None], tokens), mask)


def test_block_mask_is_made_once_and_goes_with_its_layout():
    layout = build_layout(GROUPS)
    first = flex.block_mask(layout, None)
    assert flex.block_mask(layout, None) is first
    assert flex.block_mask(layout, 3) is not first
    gc.collect()
    kept = len(flex.BLOCK_MASKS)
    del layout
    gc.collect()
    assert len(flex.BLOCK_MASKS) == kept - 1


# Every window without softcap and sinks; with them, two windows are enough.
NAIVE_CASES = [
    (softcap, with_sinks, window)
    for softcap in (None, 0.8)
    for with_sinks in (False, True)
    for window in WINDOWS
    if (softcap is None and not with_sinks) or window in (None, 6)
]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("softcap", "with_sinks", "window"), NAIVE_CASES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.slow
def test_equals_naive(heads: str, softcap: float | None, with_sinks: bool, window: int | None):
    inputs = make_inputs(MANY_TAILS, HEADS[heads])
    options = AttentionOptions(window=window, softcap=softcap)
    naive = AttentionOptions(window=window, softcap=softcap, backend="naive")
    got = run(inputs, options, as_op(flex.flex_attention_on_row), with_sinks)
    assert_close(got, run(inputs, naive, with_sinks=with_sinks))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_flex_in_chunks_equals_naive(chunk: int):
    inputs = make_inputs(MANY_TAILS, HEADS["gqa"])
    attend = as_op(lambda call: attention_in_chunks(flex.flex_attention_on_row, call, chunk))
    expected = run(inputs, AttentionOptions(chunk=chunk, backend="naive"))
    assert_close(run(inputs, AttentionOptions(chunk=chunk), attend), expected)


@pytest.mark.usefixtures("uncompiled")
def test_calls_leave_nothing_behind():
    """Each patch of the compiler's settings stays in the thread's context. One is allowed."""
    inputs = make_inputs(((7, (5, 3)),), HEADS["gqa"])
    attend, sizes = as_op(flex.flex_attention_on_row), []
    for _ in range(3):
        attend(inputs.query, inputs.key, inputs.value, inputs.layout, AttentionOptions())
        sizes.append(len(contextvars.copy_context()))
    assert sizes[1] == sizes[2]


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
def test_rows_of_all_lengths_share_what_is_compiled(monkeypatch: pytest.MonkeyPatch):
    """Few programs serve many rows, yet more than PyTorch's own limit of 8."""
    counter = CompileCounter()
    compiled = torch.compile(torch_flex.flex_attention, backend=counter, fullgraph=True)
    monkeypatch.setattr(flex, "compiled_flex", lambda: compiled)
    attend, counts = as_op(flex.flex_attention_on_row), []
    kinds = [(window, cap) for window in (None, 3) for cap in (None, 0.8)]
    for extra in (0, 40, 150, 77):
        inputs = make_inputs(((7 + extra, (5, 3)), (1, (1,))), HEADS["gqa"])
        for window, softcap in kinds:
            options = AttentionOptions(window=window, softcap=softcap)
            out = attend(inputs.query, inputs.key, inputs.value, inputs.layout, options)
            assert out.isfinite().all()
        counts.append(counter.frame_count)
    assert 8 < counts[-1] <= 3 * len(kinds)
    assert counts[2] == counts[-1], counts
