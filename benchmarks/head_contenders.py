"""Contenders of the head's benchmark: ours, plain PyTorch, the peers, and the bare products.

All do the same work on the same tensors. The forward pass computes the log-probs of the labels.
Forward and backward together compute the sum of each sequence's log-probs in fp64, the sigmoid loss
against cached reference log-probs, and the gradients of hidden states and weight. A contender's
note says where its work differs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.harness import AbsentError, Contender
from benchmarks.head_cases import BETA, Inputs, Outputs, sequence_rows
from benchmarks.head_truth import GRADIENTS
from benchmarks.suite import Entry, Work
from benchmarks.suite import contender as make_contender
from dpofast_kernels import (
    HeadOptions,
    linear_logps,
    linear_pair_loss,
    make_loss,
    sum_per_sequence,
)

TRL_VOCAB_CHUNK = 32768
IGNORED = -100
# Relative error allowed for a gradient that is rounded to bf16 after each block of the vocabulary,
# one or two thousand times. Each rounding adds an error of up to 2^-9, with either sign.
BF16_SUMS = 0.2
# Tokens on which a peer that takes no DPO loss is compared with plain PyTorch, and the relative
# error that it may have. QuACK wants a multiple of 8 tokens.
CHECKED_TOKENS = 256
SUMMED_ERROR = 0.05

LogpsFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


def contender(name: str, inputs: Inputs, step: str) -> Contender:
    """Bind a contender to its inputs; `step` is "forward" or "forward_backward"."""
    return make_contender(name, ENTRIES[name], inputs, step)


def work_of_logps(function: LogpsFunction, inputs: Inputs) -> Work:
    """The work of a contender that computes per-token log-probs and has a backward for them."""
    loss_of = make_loss("sigmoid", beta=BETA)
    lengths = inputs.bounds.diff().view(-1, 2).to(inputs.labels.device)  # [P, 2]

    @torch.no_grad()
    def forward() -> Outputs:
        return Outputs(function(inputs.hidden_states, inputs.weight, inputs.labels))

    def forward_backward() -> Outputs:
        per_token_logps = function(inputs.hidden_states, inputs.weight, inputs.labels)
        logps = sum_per_sequence(per_token_logps, inputs.bounds)
        logratios = logps - inputs.ref_logps
        losses, _, _ = loss_of.pair_loss(logratios[0::2], logratios[1::2], lengths)
        loss = losses.mean()
        gradients = torch.autograd.grad(loss, [inputs.hidden_states, inputs.weight])
        return Outputs(per_token_logps.detach(), logps.detach(), loss.detach(), *gradients)

    return Work(forward, forward_backward)


def _ours(backend: str) -> Entry:
    def make(inputs: Inputs) -> Work:
        if backend != "torch" and os.environ.get("TRITON_INTERPRET") != "1":
            _need_gpu(inputs)
        num_pairs = len(inputs.bounds) // 2
        # The trainer tells the op the factor of the loss, too.
        options = HeadOptions(backend=backend, upstream=1.0 / num_pairs)
        loss_of = make_loss("sigmoid", beta=BETA)

        @torch.no_grad()
        def forward() -> Outputs:
            return Outputs(
                linear_logps(inputs.hidden_states, inputs.weight, inputs.labels, options)
            )

        def forward_backward() -> Outputs:
            output = linear_pair_loss(
                inputs.hidden_states,
                inputs.weight,
                inputs.labels,
                inputs.bounds,
                inputs.ref_logps,
                loss_of,
                options,
            )
            loss = output.loss / num_pairs
            gradients = torch.autograd.grad(loss, [inputs.hidden_states, inputs.weight])
            return Outputs(None, output.logps, loss.detach(), *gradients)

        return Work(forward, forward_backward)

    return Entry(make)


def naive_logps(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """[N] log-probs of the labels, from logits [N, V]; autograd keeps all log-probs [N, V]."""
    all_logps = (hidden_states @ weight.t()).log_softmax(-1, dtype=torch.float32)
    return all_logps.gather(-1, labels[:, None])[:, 0]


def _naive(inputs: Inputs) -> Work:
    return work_of_logps(naive_logps, inputs)


def _compiled(inputs: Inputs) -> Work:
    return work_of_logps(torch.compile(naive_logps, fullgraph=True, dynamic=False), inputs)


def _trl(inputs: Inputs) -> Work:
    # TRL's backward imports TRL's trainer. Import it here, to keep that out of time and memory.
    import trl.trainer.utils  # noqa: F401
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def logps(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        bias, temperature, softcap, logit_scale, extra_outputs = None, 1.0, None, 1.0, ()
        per_token_logps: Tensor = ChunkedLogProbFunction.apply(
            hidden_states,
            weight,
            bias,
            labels,
            temperature,
            TRL_VOCAB_CHUNK,
            softcap,
            logit_scale,
            extra_outputs,
        )[0]
        return per_token_logps

    return work_of_logps(logps, inputs)


def _liger_flce(inputs: Inputs) -> Work:
    _need_gpu(inputs)
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    nll = LigerFusedLinearCrossEntropyLoss(reduction="none", accum_dtype=torch.float32)
    return work_of_logps(lambda x, weight, labels: -nll(weight, x, labels), inputs)


def _liger_dpo(inputs: Inputs) -> Work:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    rows = list(sequence_rows(inputs.bounds))
    rows = rows[0::2] + rows[1::2]  # all chosen, then all rejected

    def padded(tensor: Tensor, padding: float) -> Tensor:
        parts = [tensor.detach()[span] for span in rows]
        return pad_sequence(parts, batch_first=True, padding_value=padding)  # [2P, T, ...]

    is_compiled = inputs.weight.is_cuda
    loss_of = LigerFusedLinearDPOLoss(beta=BETA, compiled=is_compiled)
    hidden_states = padded(inputs.hidden_states, 0.0).requires_grad_()
    labels = padded(inputs.labels, IGNORED)
    ref_hidden_states, ref_weight = padded(inputs.ref_hidden_states, 0.0), inputs.weight.detach()
    spans = [slice(0, span.stop - span.start) for span in rows]

    def in_our_order(per_sequence: list[Tensor]) -> list[Tensor]:
        half = len(per_sequence) // 2
        return [per_sequence[half * (s % 2) + s // 2] for s in range(2 * half)]

    def run(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        loss, (chosen, rejected, *_) = loss_of(
            weight, x, labels, ref_input=ref_hidden_states, ref_weight=ref_weight
        )
        return loss, torch.stack([chosen, rejected], 1).flatten()

    @torch.no_grad()
    def forward() -> Outputs:
        return Outputs(logps=run(ref_weight, hidden_states.detach())[1])

    def forward_backward() -> Outputs:
        loss, logps = run(inputs.weight, hidden_states)
        d_padded, d_weight = torch.autograd.grad(loss, [hidden_states, inputs.weight])
        parts = [d_padded[index, span] for index, span in enumerate(spans)]
        d_hidden_states = torch.cat(in_our_order(parts))
        return Outputs(None, logps.detach(), loss.detach(), d_hidden_states, d_weight)

    return Work(forward, forward_backward)


def _cce(filter_eps: str | None) -> Callable[[Inputs], Work]:
    def make(inputs: Inputs) -> Work:
        _need_gpu(inputs)
        from cut_cross_entropy import linear_cross_entropy

        def logps(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            nll: Tensor = linear_cross_entropy(
                hidden_states,
                weight,
                labels,
                reduction="none",
                filter_eps=filter_eps,
                impl="cce",
            )
            return -nll

        return work_of_logps(logps, inputs)

    return make


def _quack(inputs: Inputs) -> Work:
    """QuACK's cross-entropy, summed over all tokens; it gives no log-prob of a single token."""
    _need_gpu(inputs)
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def loss_and_gradients(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        loss = chunked_linear_cross_entropy(x, weight, labels, reduction="sum")
        return loss.detach(), *torch.autograd.grad(loss, [x, weight])

    _check_summed(loss_and_gradients, inputs)

    @torch.no_grad()
    def forward() -> Outputs:
        x, weight = inputs.hidden_states, inputs.weight
        return Outputs(loss=chunked_linear_cross_entropy(x, weight, inputs.labels, reduction="sum"))

    def forward_backward() -> Outputs:
        found = loss_and_gradients(inputs.hidden_states, inputs.weight, inputs.labels)
        loss, d_hidden_states, d_weight = found
        return Outputs(None, None, loss, d_hidden_states, d_weight)

    return Work(forward, forward_backward)


def _check_summed(
    loss_and_gradients: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]], inputs: Inputs
) -> None:
    """Compare a summed cross-entropy and its gradients with plain PyTorch's, on a few tokens.

    Raises:
        ValueError: one of them is far off.
    """
    labels = inputs.labels[:CHECKED_TOKENS]
    x = inputs.hidden_states.detach()[:CHECKED_TOKENS].requires_grad_()
    loss = -naive_logps(x, inputs.weight, labels).sum()
    expected = (loss.detach(), *torch.autograd.grad(loss, [x, inputs.weight]))
    found = loss_and_gradients(x, inputs.weight, labels)
    for name, got, right in zip(("loss", *GRADIENTS), found, expected, strict=True):
        error = float((got.float() - right.float()).norm() / right.float().norm())
        if not error <= SUMMED_ERROR:
            raise ValueError(f"its {name} has an error of {error:.1e}, at most {SUMMED_ERROR:g}")


def _floor(fp32_d_weight: bool) -> Callable[[Inputs], Work]:
    """The bare matrix products of a head, written to preallocated outputs.

    The outputs are allocated only for this contender's rounds, because other contenders need
    the memory that the logits take.
    """

    def make(inputs: Inputs) -> Work:
        x, weight = inputs.hidden_states.detach(), inputs.weight.detach()
        if fp32_d_weight and not (x.is_cuda and x.dtype == torch.bfloat16):
            raise AbsentError("only bf16 products on a GPU have another dtype to sum in")
        outputs: list[Tensor] = []

        @contextmanager
        def holding() -> Iterator[None]:
            dtype = torch.float32 if fp32_d_weight else x.dtype
            try:
                # logits and d_logits [N, V]; d_hidden_states [N, H]; d_weight [V, H]
                outputs.append(x.new_empty(len(x), len(weight)))
                outputs.append(torch.empty_like(x))
                outputs.append(torch.empty_like(weight, dtype=dtype))
                for output in outputs:
                    output.zero_()  # the OS provides the memory only when it is first written to
                yield
            finally:
                outputs.clear()

        def forward() -> Outputs:
            torch.mm(x, weight.t(), out=outputs[0])
            return Outputs()

        def forward_backward() -> Outputs:
            logits, d_x, d_weight = outputs
            torch.mm(x, weight.t(), out=logits)
            torch.mm(logits, weight, out=d_x)
            if fp32_d_weight:
                torch.mm(logits.t(), x, out_dtype=torch.float32, out=d_weight)
            else:
                torch.mm(logits.t(), x, out=d_weight)
            return Outputs()

        return Work(forward, forward_backward, holding=holding)

    return make


def _need_gpu(inputs: Inputs) -> None:
    if not inputs.weight.is_cuda:
        raise AbsentError("its Triton kernels need a GPU")


ENTRIES: dict[str, Entry] = {
    "ours_torch": _ours("torch"),
    "ours_triton": _ours("triton"),
    "ours_triton_fused": _ours("triton_fused"),
    "naive": Entry(_naive),
    "compile": Entry(_compiled, "torch.compile of naive, compiled before it is timed"),
    "trl": Entry(_trl, "its chunked log-probs of the scored rows, without its extra outputs"),
    "liger_dpo": Entry(
        _liger_dpo,
        "takes no cached reference log-probs: scores the reference's hidden states, too; answers "
        "padded to the longest; compiled on a GPU",
        on_cpu=False,
    ),
    "liger_flce": Entry(_liger_flce, "reduction none, d_weight summed in fp32"),
    "cce_exact": Entry(
        _cce(None),
        "filter_eps=None: no gradient is dropped; sums them in bf16, block by block",
        gradient_error=BF16_SUMS,
    ),
    "cce_filtered": Entry(
        _cce("high"),
        "its default: drops blocks of small gradients; sums the others in bf16, block by block",
        gradient_error=BF16_SUMS,
    ),
    "quack": Entry(
        _quack,
        "cross-entropy summed over all tokens, no DPO loss; not judged with the others, but "
        f"compared with plain PyTorch on {CHECKED_TOKENS} tokens beforehand",
        judged=False,
    ),
    "floor": Entry(_floor(False), "the bare products, outputs preallocated", judged=False),
    "floor_fp32": Entry(
        _floor(True), "the bare products with d_weight in fp32", judged=False, on_cpu=False
    ),
}
OURS = tuple(name for name in ENTRIES if name.startswith("ours_"))
