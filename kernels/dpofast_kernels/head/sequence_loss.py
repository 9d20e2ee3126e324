"""The public op of losses of single answers: it checks its inputs and enters autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from dpofast_kernels.head.autograd import HeadCall, apply_linear_pair_loss
from dpofast_kernels.head.backends import DEFAULT_OPTIONS, backend_for
from dpofast_kernels.head.dispatch import linear_logps
from dpofast_kernels.head.dtypes import compute_dtype
from dpofast_kernels.head.inputs import check_head_inputs, check_singles
from dpofast_kernels.head.naive import naive_sequence_loss
from dpofast_kernels.head.options import Answers, HeadOptions, SequenceLossOutput
from dpofast_kernels.head.singles import Singles
from dpofast_kernels.preference import UnpairedLoss


def linear_sequence_loss(
    hidden_states: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [N]
    answers: Answers,
    loss: UnpairedLoss,
    options: HeadOptions = DEFAULT_OPTIONS,
) -> SequenceLossOutput:
    """Loss summed over single answers; log-probs, loss and gradients come from one pass.

    Args:
        hidden_states: [N, H], one for each scored token; fp64, fp32, bf16 or fp16.
        weight: [V, H], same dtype. Under torch.autocast the dtypes may differ, and both are cast to
            the autocast dtype.
        labels: [N] int64, already shifted.
        answers: the sequences. Without sequences the loss is 0 and the gradients are zero.
        loss: a loss from `make_unpaired_loss`.
        options: what the model does to its logits, and the back end.

    Returns:
        The loss (differentiable once), the summed log-probs [S] and the metrics [2, S].

    Raises:
        ValueError: shapes, dtypes or devices don't match, the bounds don't cover the rows, a
            sequence is empty, or the back end can't run. A label or a weight is out of range (off
            the CPU this is checked only with DPOFAST_CHECK_LABELS=1).
        TypeError: an argument has the wrong type.

    Numerics: as `linear_pair_loss`.

    Example:
        >>> import torch
        >>> from dpofast_kernels import Answers, linear_sequence_loss, make_unpaired_loss
        >>> hidden_states = torch.randn(5, 16, requires_grad=True)  # N 5, H 16
        >>> weight = torch.randn(100, 16, requires_grad=True)  # V 100
        >>> labels = torch.randint(100, (5,))
        >>> bounds = torch.tensor([0, 3, 5])  # two answers, of 3 and of 2 tokens
        >>> ref_logps = torch.tensor([-14.0, -9.0])
        >>> answers = Answers(bounds, ref_logps, torch.tensor([True, False]), torch.tensor(0.5))
        >>> loss = make_unpaired_loss("kto", beta=0.1)
        >>> output = linear_sequence_loss(hidden_states, weight, labels, answers, loss)
        >>> output.loss.backward()
        >>> output.logps.shape, output.metrics.shape, weight.grad.shape
        (torch.Size([2]), torch.Size([2, 2]), torch.Size([100, 16]))
    """
    check_head_inputs(hidden_states, weight, labels, options)
    limits = check_singles(answers, loss, len(labels))
    singles = _singles_on(hidden_states.device, answers, limits, loss)
    dtype = compute_dtype(hidden_states, weight)
    backend = backend_for(weight, options, dtype)
    if backend == "naive":
        # The same log-probs as from the op `linear_logps`, which casts its inputs alike.
        per_token_logps = linear_logps(hidden_states, weight, labels, options)
        return SequenceLossOutput(*naive_sequence_loss(per_token_logps, singles))
    call = HeadCall(labels, options, dtype, backend, torch.is_grad_enabled(), singles)
    results = apply_linear_pair_loss(hidden_states, weight, options.bias, call)
    return SequenceLossOutput(*results[:3])  # no statistics, and no weights of pairs


def _singles_on(
    device: torch.device, answers: Answers, limits: list[int], loss: UnpairedLoss
) -> Singles:
    """The sequences of a call, on a device and in fp64, without gradients or waiting."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, torch.float64, non_blocking=True)

    ref_logps = moved(answers.ref_logps)
    return Singles(
        answers.bounds.to(device, non_blocking=True),
        limits,
        ref_logps,
        answers.is_desirable.to(device, non_blocking=True),
        loss,
        ref_logps.new_zeros(()) if answers.z is None else moved(answers.z),
        None if answers.weights is None else moved(answers.weights),
    )
