"""Keeps the trained weights that a policy began with, which made it the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from dpofast.reference.identity.description import ReferenceIdentity
from dpofast.zero.weights import spread


class FirstWeights:
    """The trained weights of a policy as they were before step 1, on the CPU.

    Args:
        model: the policy, before step 1.
    """

    def __init__(self, model: nn.Module) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.kept = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in trained]

    @classmethod
    def of(cls, model: Any, identity: ReferenceIdentity) -> FirstWeights | None:
        """The weights to keep of a PeftModel that is its own reference.

        None if the reference is the model below the adapter and all trained weights belong to the
        adapter, so that nothing needs to be kept; and if ZeRO-3 has sharded the weights.
        """
        adapters = set(model.peft_config)
        inside = all(
            adapters & set(name.split("."))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        )
        if (inside and identity.description["adapter"] is None) or spread(model.parameters()):
            return None
        return cls(model)

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights that are kept."""
        return sum(value.nbytes for _, value in self.kept)

    @contextlib.contextmanager
    def put_back(self) -> Iterator[None]:
        """Inside the `with` block, the model has the weights that it had before step 1."""
        # On the CPU, as a device that trains has no room for the weights twice.
        now = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter, _ in self.kept]
        try:
            _copy(self.kept)
            yield
        finally:
            _copy(now)


def _copy(values: Sequence[tuple[Tensor, Tensor]]) -> None:
    for parameter, value in values:
        parameter.data.copy_(value)  # in place, as ZeRO's weights are parts of one flat tensor
