"""The arguments of attention, as one value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dpofast_kernels.attention.layout import SharedLayout
from dpofast_kernels.attention.options import AttentionOptions


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Arguments of a back end: tensors of one dtype, a layout on their device, and options.

    `shared_attention` makes it from its own arguments, once they are checked and cast.
    """

    query: Tensor  # [T, Hq, D]
    key: Tensor  # [T, Hkv, D]; [G, Hkv, D] once gathered
    value: Tensor  # [T, Hkv, Dv]; [G, Hkv, Dv] once gathered
    layout: SharedLayout
    options: AttentionOptions

    @property
    def scale(self) -> float:
        """Factor of q k^T."""
        return self.options.scale_for(self.query.shape[-1])

    @property
    def is_grouped(self) -> bool:
        """Whether several query heads share one key head."""
        return self.query.shape[1] != self.key.shape[1]
