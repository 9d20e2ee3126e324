"""RoPE of type dynamic or longrope, whose frequencies depend on the length of the sequence.

transformers takes the length from the longest row of a batch, and a module of type dynamic also
remembers the longest one that it has seen. Log-probs would then depend on the other sequences of a
batch, and on the batches before it. During our steps, each padded row therefore gets the cosines
and sines that the module, in its first state, would give the row's sequence alone.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpofast.data.packing.batch import PackedPairs
from dpofast.errors import ModelError
from dpofast.model.parts import body_of, causal_lm
from dpofast.model.replace import replaced_forwards

# A position beyond every model's original length. float32 still counts single positions here.
FAR = 2**23
# Largest relative difference between two cosines or sines that rounding explains.
TOLERANCE = 1e-5
REMEDY = (
    "use transformers' own class if it has one for this model (trust_remote_code: false), and "
    "please report this model type."
)


def depends_on_length(model: nn.Module) -> bool:
    """Whether a model's config asks for RoPE whose frequencies depend on the sequence's length."""
    config = causal_lm(model).config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # Models such as Gemma 3 have one set of parameters for each type of layer.
    ropes = [rope, *(nested for nested in rope.values() if isinstance(nested, dict))]
    types = [str(each.get("rope_type") or each.get("type") or "") for each in ropes]
    # transformers, too, looks for "dynamic" anywhere in the name.
    return any("dynamic" in each or each == "longrope" for each in types)


@contextlib.contextmanager
def rope_of_each_row(model: nn.Module, batch: PackedPairs) -> Iterator[None]:
    """Inside the `with` block, each padded row gets the RoPE of its own sequence's length.

    `micro_batch` enters this. It changes nothing for models whose RoPE doesn't depend on lengths.
    Models whose RoPE does have no packed rows; see `choose_layout`.

    Args:
        model: causal LM or PeftModel.
        batch: the micro-batch. A row's length is its number of tokens, padding excluded.
    """
    if batch.shared_layout is not None or not depends_on_length(model):
        yield
        return
    lengths: list[int] = batch.uses.count_nonzero(dim=1).tolist()
    forward = partial(_forward_of_each_row, lengths=lengths, width=batch.uses.shape[1])
    with replaced_forwards([(module, forward) for module in _ropes(model)]):
        yield


def check_rope(model: nn.Module) -> None:
    """Checks that a model's RoPE depends on lengths only where `rope_of_each_row` handles it.

    Each module is called with two positions, once within every original length and once far beyond.
    This costs next to nothing, whatever the model's context.

    Raises:
        ModelError: packed or padded rows would change each other's RoPE.
    """
    lm = causal_lm(model)
    ropes = _ropes(lm)
    if depends_on_length(lm):
        others = [module for module in _named_rotary(lm) if module not in ropes]
        if others or not ropes:
            place = type(others[0] if others else lm).__name__
            raise ModelError(
                f"The RoPE of {type(lm).__name__} depends on the length of a sequence, but dpofast "
                f"can't give each row its own, as {place} isn't called with position_ids; {REMEDY}"
            )
        return
    for module in ropes:
        if any(_depends(module, more) for more in _layer_types(module)):
            raise ModelError(
                f"{type(module).__name__} gives a sequence other angles beside a longer one, "
                f"although rope_parameters in the config of {type(lm).__name__} don't say so; "
                "its log-probs would depend on their batch; please report this model type."
            )


def _forward_of_each_row(
    module: nn.Module,
    x: Tensor,
    position_ids: Tensor,  # [..., B or 1, L]; in padded rows all rows have the same positions
    *args: Any,
    lengths: list[int],
    width: int,
    **kwargs: Any,
) -> Any:
    """The forward of a RoPE module during a step.

    Args:
        x: tells the dtype and the device.
        args, kwargs: what else the module's own forward takes, such as a type of layer.
        lengths: tokens of each row.
        width: tokens of a row with its padding.

    Returns:
        What the module's own forward returns, [B, L, D] or a tuple of that; padding has zeros. If
        all rows have the same length, [1, L, D].

    Raises:
        ModelError: the module gives other positions or shapes.
    """
    if position_ids.shape[-1] != width:
        raise _unexpected(module)
    tables: dict[int, tuple[Tensor, ...]] = {}
    for length in set(lengths):
        result = _alone(module, x, position_ids[..., :1, :length], *args, **kwargs)
        tables[length] = result if isinstance(result, tuple) else (result,)
        if any(table.shape[-3:-1] != (1, length) for table in tables[length]):
            raise _unexpected(module)
    if len(tables) == 1:
        return result  # it serves all rows, as in stock models
    for length, unpadded in tables.items():
        tables[length] = tuple(F.pad(table, (0, 0, 0, width - length)) for table in unpadded)
    rows = zip(*(tables[length] for length in lengths), strict=True)
    outputs = tuple(torch.cat(tensors, dim=-3) for tensors in rows)
    return outputs if isinstance(result, tuple) else outputs[0]


def _alone(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Runs a RoPE module's own forward on `x.device`, in the state that the module began with.

    A copy runs, so that nothing of this call remains in the module: neither a state that later
    calls, stock ones included, would depend on, nor one that DDP would send to other ranks.
    """
    twin: Any = copy.copy(module)
    # One tensor can have two names here: transformers makes the original frequencies the current.
    buffers = module.named_buffers(recurse=False, remove_duplicate=False)
    twin._buffers = {name: tensor.to(x.device, copy=True) for name, tensor in buffers}
    # Names of transformers' `dynamic_rope_update`; models with several kinds of RoPE prefix them.
    for name in [*vars(twin), *twin._buffers]:
        if name.endswith("max_seq_len_cached"):
            setattr(twin, name, getattr(twin, "original_max_seq_len", getattr(twin, name)))
        elif name.endswith("long_inv_freq"):  # transformers 5.17 fails where it was kept
            delattr(twin, name)
        elif name.endswith("original_inv_freq"):
            begin = getattr(twin, name).to(x.device, copy=True)
            twin._buffers[name.replace("original_inv_freq", "inv_freq")] = begin
    forward: Callable[..., Any] = type(module).forward
    return forward(twin, x, *args, **kwargs)


def _ropes(model: nn.Module) -> list[nn.Module]:
    """The modules that turn positions into angles, as transformers' own do."""
    return [
        module
        for module in body_of(causal_lm(model)).modules()
        if any(name.endswith("inv_freq") for name in module._buffers)
        and "position_ids" in inspect.signature(type(module).forward).parameters
    ]


def _named_rotary(lm: Any) -> list[nn.Module]:
    """The modules that turn positions into angles, by the name of their class."""
    return [module for module in body_of(lm).modules() if "rotary" in type(module).__name__.lower()]


def _layer_types(module: Any) -> list[dict[str, str]]:
    """The arguments, besides positions, that tell the kinds of RoPE in a module apart."""
    kinds = getattr(module, "rope_type", None)
    return [{"layer_type": name} for name in kinds] if isinstance(kinds, dict) else [{}]


def _depends(module: nn.Module, more: dict[str, str]) -> bool:
    """Whether the angles of position 1 change with the longest position of the call."""
    x = torch.zeros(1, 2, 1)  # on the CPU, where a position that a table doesn't have only raises
    try:
        near, far = (
            _alone(module, x, position_ids=torch.tensor([[1, last]]), **more) for last in (1, FAR)
        )
    except Exception:  # code from elsewhere, which needs other arguments or looks up a table
        return False
    pairs = zip(near, far, strict=True) if isinstance(near, tuple) else [(near, far)]
    return any(
        not torch.allclose(one[..., :1, :], other[..., :1, :], rtol=TOLERANCE, atol=0.0)
        for one, other in pairs
    )


def _unexpected(module: nn.Module) -> ModelError:
    return ModelError(
        f"{type(module).__name__} depends on the length of a sequence, but its positions or its "
        f"results aren't those of padded rows, so dpofast can't give each row its own; {REMEDY}"
    )
