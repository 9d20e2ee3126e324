"""The body of a training step, op by op: a run on the meta device, which computes no numbers.

Each op takes the time of its operations or of its bytes, whichever is longer, and that of a launch.
"""

# TorchDispatchMode has no types.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

import dpofast.model.attention as model_attention
from benchmarks.attention_cases import fill_row, pair_groups
from benchmarks.model.assumptions import ADAMW_BYTES, Assumptions
from benchmarks.model.fused import fused_layers
from benchmarks.train_cases import SHAPES
from dpofast_kernels.attention import AttentionOptions, SharedLayout, build_layout
from dpofast_kernels.attention.call import AttentionCall
from dpofast_kernels.attention.flash import varlen_attention

DATA = "dpo_en_demo"
PRODUCTS = ("mm", "addmm", "bmm")
BACKWARD_FACTOR = 2.5  # products of attention's backward over those of its forward
# Ops that launch no kernel.
# fmt: off
VIEWS = frozenset((
    "view", "_unsafe_view", "t", "transpose", "expand", "unsqueeze", "squeeze", "select",
    "slice", "as_strided", "detach", "alias", "split", "split_with_sizes", "unsafe_split",
    "permute", "unbind", "reshape", "lift_fresh", "empty", "empty_like", "new_empty",
    "empty_strided", "new_empty_strided",
))
# fmt: on


@dataclass
class Work:
    """Launches, bytes, operations and seconds of one kind of op."""

    launches: int = 0
    bytes: float = 0.0
    flop: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Body:
    """What the forward and backward of the body of one packed row take.

    Attributes:
        tokens: tokens of the row.
        lengths: [2P], scored tokens of each of its answers.
        hidden, vocab: H and V.
        parameters: parameters of the model.
        work: by kind: "products", "elementwise" and "attention".
    """

    tokens: int
    lengths: tuple[int, ...]
    hidden: int
    vocab: int
    parameters: int
    work: dict[str, Work] = field(repr=False)

    @property
    def seconds(self) -> float:
        return sum(each.seconds for each in self.work.values())

    @property
    def launches(self) -> int:
        return sum(each.launches for each in self.work.values())

    def optimizer_seconds(self, assumed: Assumptions) -> float:
        """Seconds of fused AdamW on bf16 weights, once a step."""
        return ADAMW_BYTES * self.parameters / assumed.body_bandwidth


class OpCounter(TorchDispatchMode):
    """Adds up the work of every op that runs inside the `with` block.

    Args:
        assumed: the card.
        attention_flop: operations of one forward call of attention.
    """

    def __init__(self, assumed: Assumptions, attention_flop: float) -> None:
        super().__init__()
        self.assumed, self.attention_flop = assumed, attention_flop
        self.work = {kind: Work() for kind in ("products", "elementwise", "attention")}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, name = func._schema.name.split("::")
        if namespace == "prim" or (namespace == "aten" and name in VIEWS):
            return result
        given = list(_tensors((args, list((kwargs or {}).values()))))
        touched = [*given, *_tensors(result)]
        if not any(tensor.is_meta for tensor in touched):
            return result
        moved, assumed = sum(map(_bytes, touched)), self.assumed
        if name in PRODUCTS:
            self._add("products", moved, _product_flop(*given[-2:]), assumed.body_rate)
        elif name.startswith("_varlen"):
            is_backward = "backward" in name
            rate = assumed.attention_backward_rate if is_backward else assumed.attention_rate
            flop = self.attention_flop * (BACKWARD_FACTOR if is_backward else 1.0)
            self._add("attention", moved, flop, rate)
        else:
            self.charge(moved)
        return result

    def charge(self, moved: float) -> None:
        """Add one elementwise kernel that reads and writes this many bytes."""
        self._add("elementwise", moved, 0.0, self.assumed.body_rate)

    def _add(self, kind: str, moved: float, flop: float, rate: float) -> None:
        total = self.work[kind]
        total.launches += 1
        total.bytes += moved
        total.flop += flop
        total.seconds += max(flop / rate, moved / self.assumed.body_bandwidth) + self.assumed.launch


def predict_body(
    shape: str,
    max_tokens: int,
    assumed: Assumptions,
    *,
    checkpointing: bool,
    fused: bool = False,
    layers: int | None = None,
) -> Body:
    """Predict the body of one packed row of real lengths, in bf16.

    Args:
        shape: key of `benchmarks.train_cases.SHAPES`.
        max_tokens: largest number of tokens in the row; it holds the pairs that fit.
        assumed: the card.
        checkpointing: whether every layer runs again in the backward.
        fused: whether norms, rotations and gated activations are one kernel each, like Liger's.
        layers: number of layers; None for the shape's.
    """
    model = _model(shape, layers)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    groups = fill_row(pair_groups(DATA), max_tokens)
    layout = build_layout(groups)
    config, tokens = model.config, layout.num_tokens
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    counter = OpCounter(assumed, 4.0 * head_dim * heads * _scores(layout))
    layout = layout.to("meta")
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    with contextlib.ExitStack() as stack:
        stack.enter_context(model_attention.packed_attention(config, layout))
        stack.enter_context(_varlen_everywhere())
        if fused:
            stack.enter_context(fused_layers(model, counter.charge))
        stack.enter_context(counter)
        hidden = model.model(
            input_ids=ids,
            position_ids=layout.position_ids[None],
            shared_layout=layout,
            use_cache=False,
        )[0]
        hidden.backward(torch.empty_like(hidden))
    return Body(
        tokens,
        tuple(length for _, tails in groups for length in tails),
        config.hidden_size,
        config.vocab_size,
        sum(parameter.numel() for parameter in model.parameters()),
        counter.work,
    )


def _model(shape: str, layers: int | None) -> Any:
    model_type, given = SHAPES[shape]
    fields = dict(given)
    if layers is not None:
        fields["num_hidden_layers"] = layers
    config = AutoConfig.for_model(model_type, pad_token_id=0, **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return model.train()


@contextlib.contextmanager
def _varlen_everywhere() -> Iterator[None]:
    """Make packed attention run the back end of CUDA, whatever the device."""

    def varlen(
        query: Tensor, key: Tensor, value: Tensor, layout: SharedLayout, options: AttentionOptions
    ) -> Tensor:
        return varlen_attention(AttentionCall(query, key, value, layout, options))

    with mock.patch.object(model_attention, "shared_attention", varlen):
        yield


def _scores(layout: SharedLayout) -> int:
    """Pairs of a query and a key that it attends to."""
    lengths: Sequence[tuple[int, int]] = list(
        zip(layout.query_lengths, layout.key_lengths, strict=True)
    )
    return sum(queries * (2 * keys - queries + 1) // 2 for queries, keys in lengths)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _bytes(tensor: Tensor) -> int:
    """Bytes of the elements that a kernel touches: expanded dimensions count once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()


def _product_flop(left: Tensor, right: Tensor) -> float:
    batch = left.shape[0] if left.dim() == 3 else 1
    return 2.0 * batch * left.shape[-2] * left.shape[-1] * right.shape[-1]
