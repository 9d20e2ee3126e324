"""Micro-batches of single answers whose step has estimated z."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

from dpofast.data.packing.answers import PackedAnswers


@dataclass(frozen=True, kw_only=True)
class ScoredAnswers(PackedAnswers):
    """PackedAnswers with their z; the mismatched answers have been scored, and are left out.

    Attributes:
        mismatched_logratios: [S] fp64, log-ratios of the mismatched answers, in nats. z is a mean
            of them and of those of other micro-batches.
    """

    mismatched_logratios: Tensor

    @classmethod
    def with_z(cls, batch: PackedAnswers, z: Tensor, logratios: Tensor) -> ScoredAnswers:
        """The micro-batch with z [] and the log-ratios [S] of its mismatched answers."""
        values = {field.name: getattr(batch, field.name) for field in fields(PackedAnswers)}
        values |= {"mismatched": None, "z": z}
        return cls(**values, mismatched_logratios=logratios)
