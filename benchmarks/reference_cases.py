"""What is scored in the race of reference log-probs: the model and the pairs, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from benchmarks.train_cases import Case, Work

# By dtype, how much an answer's summed log-prob may differ from naive's, relative.
TOLERANCES = {"float32": {"logps": 1e-5}, "bfloat16": {"logps": 2e-2}}
BATCH_SIZES: tuple[int, ...] = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class ReferenceCase(Case):
    """One race: all pairs are scored in one go, which is its only step.

    A batch needn't divide the pairs. What Case says of training plays no part.
    """

    pairs_per_step: int = 100
    steps: int = 1
    fixed_batch: int = 1

    def __post_init__(self) -> None:
        """Any number of pairs will do."""

    @property
    def tolerances(self) -> dict[str, float]:
        return TOLERANCES[self.dtype]

    def batches_of(self, contender: str) -> tuple[int, ...]:
        return self.batch_sizes.get(contender, (self.fixed_batch,))


class ReferenceWork(Work):
    """A case with its pairs, which are `timed_pairs`."""

    case_type: ClassVar[type[Case]] = ReferenceCase


def race_case() -> ReferenceCase:
    """The race on a CPU: the model and the file of the race of whole steps."""
    return ReferenceCase("race", batch_sizes={"trl": BATCH_SIZES})


def gpu_case(shape: str) -> ReferenceCase:
    """The race on a GPU: bf16, long rows, and everyone at the best batch size."""
    sizes = {"trl": BATCH_SIZES, "naive": BATCH_SIZES}
    return ReferenceCase(shape, dtype="bfloat16", max_tokens=16384, batch_sizes=sizes)


def tiny(case: ReferenceCase) -> ReferenceCase:
    """The same race with a tiny model and few short pairs, for a dry run."""
    sizes: dict[str, tuple[int, ...]] = dict.fromkeys(case.batch_sizes, (1, 2))
    return replace(
        case, shape="tiny", data="random", pairs_per_step=8, max_tokens=64, batch_sizes=sizes
    )
