"""Compares the functions of mixers in packed rows with the same functions on separate sequences.

In a whole model, a state may change the hidden states by less than bf16 rounds them, so comparing
these doesn't show that states are passed on. Here nothing in a recurrence decays or goes past the
state: a function that loses a state, or takes that of another sequence, is far off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpofast_kernels.recurrent import RowParts

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


@dataclass
class RecurrenceProbe:
    """Compares each function once, in the first mixer that calls it, while `probed` is open.

    Attributes:
        errors: for each function, the norm of the difference relative to the norm of the outputs.
    """

    errors: dict[str, float] = field(default_factory=dict)

    def compare(
        self,
        name: str,
        own: Callable[..., Any],
        shared: Callable[..., Any],
        parts: RowParts,
        args: Args,
        kwargs: Kwargs,
    ) -> None:
        """Compare a function, unless a mixer before has called it already.

        Args:
            name: the function's name in the mixers' module.
            own: the mixer's own function.
            shared: the function for packed rows.
            parts: the parts of the row.
            args, kwargs: what the mixer passes to it.
        """
        if name in self.errors:
            return
        token_dim, remembering = _FUNCTIONS[name]
        args, kwargs = remembering(args, kwargs)
        with torch.no_grad():
            found = _output(shared(*args, **kwargs)).float()
            expected = _separately(own, token_dim, parts, args, kwargs).float()
        error = (found - expected).norm() / expected.norm().clamp_min(1e-12)
        self.errors[name] = error.item()


_open: list[RecurrenceProbe] = []


@contextlib.contextmanager
def probed() -> Iterator[RecurrenceProbe]:
    """Inside the `with` block, packed rows also compare the functions of their mixers.

    This happens inside the mixer's forward, where a model with sharded weights has them.
    """
    probe = RecurrenceProbe()
    _open.append(probe)
    try:
        yield probe
    finally:
        _open.pop()


def open_probe() -> RecurrenceProbe | None:
    """The probe of the innermost `probed` block; None outside."""
    return _open[-1] if _open else None


def _separately(
    own: Callable[..., Any], token_dim: int, parts: RowParts, args: Args, kwargs: Kwargs
) -> Tensor:
    """The outputs of all parts, each from a call with the whole sequence up to its end."""
    ends = torch.tensor(parts.lengths).cumsum(0).tolist()
    tokens = [list(range(end - n, end)) for n, end in zip(parts.lengths, ends, strict=True)]
    outputs = []
    for number, (count, prefix) in enumerate(zip(parts.lengths, parts.prefixes, strict=True)):
        sequence = [*([] if prefix is None else tokens[prefix]), *tokens[number]]

        def of_sequence(value: Any, sequence: list[int] = sequence) -> Any:
            # what has fewer dimensions is a parameter
            if not isinstance(value, Tensor) or value.dim() < 3:
                return value
            return value.index_select(token_dim, torch.tensor(sequence, device=value.device))

        options = {name: of_sequence(value) for name, value in kwargs.items()}
        output = _output(own(*map(of_sequence, args), **options))
        outputs.append(output.narrow(token_dim, len(sequence) - count, count))
    return torch.cat(outputs, token_dim)


def _output(result: Any) -> Tensor:
    """The outputs, without the state that some functions return with them."""
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


def _as_it_is(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    return args, kwargs


def _delta_rule(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """A gated delta rule whose state doesn't decay."""
    return args, {**kwargs, "g": torch.zeros_like(kwargs["g"])}


def _state_space(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Mamba-2's scan whose state doesn't decay, without D, by which inputs bypass the state."""
    hidden_states, dt, decay, *others = args
    return (hidden_states, dt, torch.zeros_like(decay), *others), {**kwargs, "D": None}


# By a function's name: the dimension of tokens in its inputs, and its arguments for the comparison.
_FUNCTIONS: dict[str, tuple[int, Callable[[Args, Kwargs], tuple[Args, Kwargs]]]] = {
    "causal_conv1d_fn": (-1, _as_it_is),
    "torch_chunk_gated_delta_rule": (1, _delta_rule),
    "chunk_kimi_delta_attention": (1, _delta_rule),
    "mamba2_chunk_scan": (1, _state_space),
}
