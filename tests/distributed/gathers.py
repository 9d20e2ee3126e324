"""Counts what ZeRO-3 gathers."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn


@contextlib.contextmanager
def count_gathers(model: nn.Module) -> Iterator[Counter[str]]:
    """Count every all-gather of a parameter under its name.

    DeepSpeed gathers a partitioned parameter only through two functions, which it sets on the
    parameter. `all_gather_coalesced` serves the hooks around modules and prefetching, `all_gather`
    everything else. Both get a list of parameters and skip those that are whole already, so the
    counts here are counts of collectives.
    """
    counts: Counter[str] = Counter()
    names = {id(p): name for name, p in model.named_parameters()}

    def counted(parameter: Any, gather: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(params: Iterable[Any] | None = None, *args: Any, **kwargs: Any) -> Any:
            params = [parameter] if params is None else list(params)
            absent = [p for p in params if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
            counts.update(names[id(p)] for p in absent)
            return gather(params, *args, **kwargs)

        return wrapper

    kept = [(p, p.all_gather_coalesced, p.all_gather) for p in model.parameters()]
    for parameter, coalesced, gather in kept:
        parameter.all_gather_coalesced = counted(parameter, coalesced)
        parameter.all_gather = counted(parameter, gather)
    try:
        yield counts
    finally:
        for parameter, coalesced, gather in kept:
            parameter.all_gather_coalesced, parameter.all_gather = coalesced, gather
