"""How the head cuts the rows of pairs into chunks; pairs are never cut here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpofast_kernels.head import plan_chunks

FORMER_WORKSPACE_BYTES = 10**9  # at 086dbb7


@dataclass(frozen=True)
class Plan:
    """The rows of each chunk, and whether a single chunk's gradient of the weight has no sum."""

    chunks: tuple[int, ...]
    rounds_at_once: bool


def todays_plan(lengths: Sequence[int], hidden_size: int, vocab_size: int) -> Plan:
    """The package's own plan for bf16 on CUDA.

    Args:
        lengths: [2P], scored tokens of each answer.
        hidden_size: H.
        vocab_size: V.
    """
    plan = plan_chunks(lengths, vocab_size, hidden_size)
    return Plan(plan.rows, plan.rounds_at_once)


def former_plan(lengths: Sequence[int], vocab_size: int, element_bytes: int) -> Plan:
    """The plan at 086dbb7: pairs were taken while they fitted, and all chunks were summed in fp32.

    Args:
        lengths: [2P], scored tokens of each answer.
        vocab_size: V.
        element_bytes: bytes of a logit.
    """
    most_rows = FORMER_WORKSPACE_BYTES // (element_bytes * vocab_size)
    chunks: list[int] = []
    for chosen, rejected in zip(lengths[0::2], lengths[1::2], strict=True):
        rows = chosen + rejected
        if chunks and chunks[-1] + rows <= most_rows:
            chunks[-1] += rows
        else:
            chunks.append(rows)
    return Plan(tuple(chunks), rounds_at_once=False)
