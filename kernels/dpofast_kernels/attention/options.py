"""Options of attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

BACKENDS = ("auto", "sdpa", "plain", "varlen", "flash3", "flash_attn", "flex", "naive")


@dataclass(frozen=True, eq=False)
class AttentionOptions:
    """What a layer does to its scores, and how the op runs.

    Attributes:
        scale: factor of q k^T; None means D^-0.5.
        window: number of positions that a query looks at, ending at its own, as transformers counts
            them; None means no limit.
        chunk: number of positions in a chunk, counted from the beginning of each sequence; a query
            looks only at the keys of its own chunk. None means no chunks.
        softcap: cap of the scores, softcap tanh(score / softcap); above 0, or None.
        sinks: [Hq], one extra score per head that takes its share of the softmax and adds no
            value. It gets a gradient, too.
        backend: "auto" takes the fastest one that can run: the first of "flash3", "varlen",
            "flash_attn", "flex", "sdpa", "plain". The first four need a GPU. "flash3" and
            "flash_attn" need a separate package; "varlen" is PyTorch's flash attention, and "flex"
            its FlexAttention. "sdpa" and "plain" go segment by segment on any device. "naive" masks
            all T x T scores, for comparison.

    Raises:
        ValueError: an option is out of range, or the back end is unknown.
    """

    scale: float | None = None
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("scale", "softcap"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"{name} is {value}, expected a finite number above 0, or None.")
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"window is {self.window}, expected at least 1 (a query sees itself), or None."
            )
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk}, expected at least 1, or None.")
        if self.backend not in BACKENDS:
            raise ValueError(
                f"Unknown backend {self.backend!r}, expected one of {', '.join(BACKENDS)}."
            )

    def scale_for(self, head_dim: int) -> float:
        """Factor of q k^T for heads of this size."""
        return head_dim**-0.5 if self.scale is None else self.scale
