"""The reference store of one run: log-probs of its reference, read from disk or scored."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from dpofast.data.packing.ld_weights import ld_weights
from dpofast.errors import MissingRowsError
from dpofast.options.config import DPOConfig
from dpofast.reference.build.answers import PairAnswers
from dpofast.reference.build.batches import Batches
from dpofast.reference.build.builder import (
    BuildOptions,
    ReferenceReport,
    Scorer,
    build_reference,
    reference_logps,
)
from dpofast.reference.build.ranks import Exchange, Ranks
from dpofast.reference.build.weighted import weighted_logps
from dpofast.reference.identity.description import ReferenceIdentity
from dpofast.reference.store.namespace import Namespace
from dpofast.reference.store.row_detail import RowDetail
from dpofast.reference.store.store import ReferenceStore


@dataclass(frozen=True)
class Scoring:
    """How the answers that are missing from the store are scored.

    Attributes:
        scorer: the reference model.
        batches: says which answers share a call of the scorer.
        sum_over_ranks: adds up counts, so that reports cover all ranks.
        exchange: exchanges objects between ranks; given only if each rank holds a part of the
            scorer's model.
    """

    scorer: Scorer
    batches: Batches
    sum_over_ranks: Callable[[list[int]], list[int]]
    exchange: Exchange | None = None


class RunStore:
    """Reads and writes the log-probs of a run's one reference.

    Args:
        folder: folder of the store; None for a temporary one that ends with this object.
        ranks: place of this process among the processes of the run.
        detail: what is stored of each answer that this run scores.
        ld_alpha: weight of the tokens by which an answer is longer than the other one of its
            pair; None for 1. It needs a detail of per-token log-probs.

    Attributes:
        reports: what was needed, found and scored, by dataset name.
    """

    def __init__(
        self,
        folder: Path | None,
        ranks: Ranks,
        detail: RowDetail = RowDetail.LOGPS,
        ld_alpha: float | None = None,
    ) -> None:
        self.detail, self.ld_alpha = detail, ld_alpha
        self._least = RowDetail.SUMS if ld_alpha is None else RowDetail.LOGPS  # for training
        self._temporary = None
        if folder is None:
            # Ranks don't share a temporary folder, so each scores all that it needs.
            self._temporary = tempfile.TemporaryDirectory(prefix="dpofast-reference-")
            folder, ranks = Path(self._temporary.name), Ranks()
        self.folder, self.ranks = folder, ranks
        self.reports: dict[str, ReferenceReport] = {}
        self._namespace: Namespace | None = None

    @classmethod
    def of(cls, config: DPOConfig, barrier: Callable[[], None]) -> RunStore:
        """The store that the options name; `barrier` returns when all ranks have called it."""
        ranks = Ranks(config.process_index, config.world_size, barrier)
        detail = config.reference_detail()
        return cls(config.reference_folder(), ranks, detail, config.length_discount())

    def open(self, identity: ReferenceIdentity) -> None:
        """Settle which reference's log-probs are read and written from here on."""
        store = ReferenceStore.open(self.folder, create=True)
        self._namespace = store.namespace(identity)

    @property
    def namespace(self) -> Namespace:
        """The stored rows of the run's reference."""
        assert self._namespace is not None, "open() comes first"
        return self._namespace

    def fill(
        self,
        answers: PairAnswers,
        name: str,
        scoring: Scoring,
        rescore: bool = False,
        goes_on: bool = False,
    ) -> np.ndarray:
        """Score the answers that are missing, and read all of them.

        Args:
            answers: answers of a dataset.
            name: dataset name, used in messages and reports.
            scoring: how missing answers are scored.
            rescore: score answers again if the store has less detail than this run asks for.
                Training needs only the sums, or with `ld_alpha` the per-token log-probs, and
                any row that has them is enough for it. `dpofast ref build` sets this.
            goes_on: the dataset is a stream, of which these are the next answers. Its report covers
                all of them, and only the first are worth a line in the log.

        Returns:
            [n, 2] fp64, summed log-probs of chosen and rejected of each pair, in nats; with
            `ld_alpha`, weighted sums.

        Raises:
            ReferenceStoreError: the store can't be read or written, or a log-prob isn't finite.
        """
        is_new = not (goes_on and name in self.reports)
        report = build_reference(
            self.namespace,
            answers,
            scoring.scorer,
            batches=scoring.batches,
            ranks=self.ranks,
            options=BuildOptions(
                detail=self.detail,
                least=self.detail if rescore else self._least,
                progress=is_new,
                logs=is_new,
            ),
            description=f"reference log-probs ({name})",
            exchange=scoring.exchange,
        )
        scored, passes = scoring.sum_over_ranks([report.rows_scored, report.forward_passes])
        report = replace(report, rows_scored=scored, forward_passes=passes)
        self._note(report, name, goes_on)
        return self._sums(answers)

    def num_missing(self, answers: PairAnswers) -> int:
        """Number of distinct answers without a usable row, as this rank sees the store now."""
        self.namespace.refresh()
        keys = answers.keys[answers.first]
        return int((~self.namespace.contains(keys, self._least)).sum())

    def read(
        self, answers: PairAnswers, name: str, why_gone: str = "", goes_on: bool = False
    ) -> np.ndarray:
        """Read the log-probs of a dataset's answers without a reference that could be run.

        Args:
            answers: answers of the dataset.
            name: dataset name, used in reports.
            why_gone: why the reference can't be run, for the message; the rest of a sentence.
            goes_on: as in `fill`.

        Returns:
            As in `fill`.

        Raises:
            MissingRowsError: an answer is missing.
            ReferenceStoreError: the store is damaged.
        """
        try:
            logps = self._sums(answers)
        except MissingRowsError as error:
            raise MissingRowsError(
                f"{error} They can't be made now: without a ref_model the reference is the policy "
                f"as it stood before step 1, which has moved since, and {why_gone}. Give this "
                "dataset to the trainer before training, or pass that model as ref_model."
            ) from error
        needed = len(answers.first)
        self._note(ReferenceReport(needed, needed, 0, 0, 0.0), name, goes_on)
        return logps

    def _sums(self, answers: PairAnswers) -> np.ndarray:
        """Read the log-probs of the answers: [n, 2] fp64, weighted if the options say so."""
        if self.ld_alpha is None:
            return reference_logps(self.namespace, answers)
        return weighted_logps(self.namespace, answers, partial(ld_weights, alpha=self.ld_alpha))

    def _note(self, report: ReferenceReport, name: str, goes_on: bool) -> None:
        """Keep the report of a dataset, or add to that of a stream."""
        before = self.reports.get(name)
        self.reports[name] = _sum([before, report]) if goes_on and before else report

    def totals(self) -> ReferenceReport | None:
        """The reports of all datasets added up; None before the first."""
        return _sum(list(self.reports.values())) if self.reports else None


def _sum(reports: list[ReferenceReport]) -> ReferenceReport:
    return replace(
        reports[0],
        rows_needed=sum(report.rows_needed for report in reports),
        rows_found=sum(report.rows_found for report in reports),
        rows_scored=sum(report.rows_scored for report in reports),
        forward_passes=sum(report.forward_passes for report in reports),
        seconds=sum(report.seconds for report in reports),
    )
