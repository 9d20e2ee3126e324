"""The cases of the race of reference log-probs: a model and the pairs that it scores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from benchmarks.train_cases import Case, Work

# By dtype: allowed relative difference of an answer's summed log-prob from naive's.
TOLERANCES = {"float32": {"logps": 1e-5}, "bfloat16": {"logps": 2e-2}}
BATCH_SIZES: tuple[int, ...] = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class ReferenceCase(Case):
    """One race, whose only step scores all pairs.

    Batches need not divide the pairs evenly. The fields of `Case` for training are not used.
    """

    pairs_per_step: int = 100
    steps: int = 1
    fixed_batch: int = 1

    def __post_init__(self) -> None:
        """Accept any number of pairs, unlike `Case`."""

    @property
    def tolerances(self) -> dict[str, float]:
        return TOLERANCES[self.dtype]

    def batches_of(self, contender: str) -> tuple[int, ...]:
        return self.batch_sizes.get(contender, (self.fixed_batch,))


class ReferenceWork(Work):
    """A case with the pairs to score, `timed_pairs`."""

    case_type: ClassVar[type[Case]] = ReferenceCase


def race_case() -> ReferenceCase:
    """The race on a CPU, with the model and the data of the race of whole steps."""
    return ReferenceCase("race", batch_sizes={"trl": BATCH_SIZES})


def gpu_case(shape: str) -> ReferenceCase:
    """The race on a GPU: bf16, long packed rows, each contender at its best batch size."""
    sizes = {"trl": BATCH_SIZES, "naive": BATCH_SIZES}
    return ReferenceCase(shape, dtype="bfloat16", max_tokens=16384, batch_sizes=sizes)


def tiny(case: ReferenceCase) -> ReferenceCase:
    """The same race with a tiny model and few short pairs, for a dry run."""
    sizes: dict[str, tuple[int, ...]] = dict.fromkeys(case.batch_sizes, (1, 2))
    return replace(
        case, shape="tiny", data="random", pairs_per_step=8, max_tokens=64, batch_sizes=sizes
    )
