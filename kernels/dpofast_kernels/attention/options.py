"""What attention is told."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

BACKENDS = ("auto", "sdpa", "plain", "varlen", "flash3", "flash_attn", "flex", "naive")


@dataclass(frozen=True, eq=False)
class AttentionOptions:
    """What a layer does to its scores, and how the op is to run.

    Attributes:
        scale: what q k^T is multiplied with; None is D^-0.5.
        window: a query sees itself and the window - 1 positions before it, as in transformers;
            None is all of them.
        softcap: scores become softcap tanh(score / softcap); above 0, or None.
        sinks: [Hq], a score per head that takes its part of the softmax and gives no value; gets a
            gradient, too.
        backend: "auto" takes the fastest that can: "flash3", "varlen", "flash_attn", "flex",
            "sdpa", "plain", in this order. "flash3" and "flash_attn" are packages of their own,
            "varlen" is what PyTorch has of them, "flex" its FlexAttention: these four for GPUs.
            "sdpa" and "plain" go segment by segment on any device. "naive" masks all T x T scores
            and is there to compare with.

    Raises:
        ValueError: an option out of range, or an unknown backend.
    """

    scale: float | None = None
    window: int | None = None
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
        if self.backend not in BACKENDS:
            raise ValueError(
                f"Unknown backend {self.backend!r}, expected one of {', '.join(BACKENDS)}."
            )

    def scale_for(self, head_dim: int) -> float:
        """What q k^T is multiplied with, where heads have this size."""
        return head_dim**-0.5 if self.scale is None else self.scale
