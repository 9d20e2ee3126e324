"""Reference log-probs for a run: from the store, and what it lacks from the reference itself."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dpofast.errors import MissingRowsError
from dpofast.reference.build.answers import read_answers
from dpofast.reference.build.batches import Batches
from dpofast.reference.build.builder import (
    BuildOptions,
    ReferenceReport,
    Scorer,
    build_reference,
    reference_logps,
)
from dpofast.reference.build.ranks import Exchange, Ranks
from dpofast.reference.identity.description import ReferenceIdentity
from dpofast.reference.store.namespace import Namespace
from dpofast.reference.store.row_detail import RowDetail
from dpofast.reference.store.store import ReferenceStore

__all__ = ["Ranks", "ReferenceProvider"]


class ReferenceProvider:
    """Gives each dataset's reference log-probs, under one reference for the whole run.

    Args:
        folder: of the store; None for a temporary one that ends with this object.
        ranks: this process among those of the run.
        detail: what is stored of what this run scores.

    Attributes:
        rescore: whether rows that the store has in less detail are scored again. A run needs the
            sums alone, so to it any row is as good; `dpofast ref build` asks for the detail.
    """

    def __init__(
        self, folder: Path | None, ranks: Ranks, detail: RowDetail = RowDetail.LOGPS
    ) -> None:
        self.detail, self.rescore = detail, False
        self._temporary = None
        if folder is None:
            # Each rank of a run that keeps nothing scores what it needs for itself.
            self._temporary = tempfile.TemporaryDirectory(prefix="dpofast-reference-")
            folder, ranks = Path(self._temporary.name), Ranks()
        self.folder, self.ranks = folder, ranks
        self.reports: dict[str, ReferenceReport] = {}
        self.identity: ReferenceIdentity | None = None
        self._namespace: Namespace | None = None

    def fix(self, identity: ReferenceIdentity) -> None:
        """Settle which reference this run is trained against."""
        self.identity = identity
        self._namespace = ReferenceStore.open(self.folder, create=True).namespace(identity)

    def fix_recorded(self, digest: str, description: dict[str, Any]) -> None:
        """Settle on the reference that a checkpoint names; its rows can be read, not made."""
        self.fix(ReferenceIdentity(digest, description))

    @property
    def namespace(self) -> Namespace:
        """The rows of the run's reference."""
        assert self._namespace is not None, "fix() comes first"
        return self._namespace

    def logps(
        self,
        pairs: Any,
        name: str,
        scorer: Scorer | None,
        batches: Batches,
        sum_over_ranks: Callable[[list[int]], list[int]] = lambda counts: counts,
        exchange: Exchange | None = None,
    ) -> np.ndarray:
        """Summed reference log-probs of each pair: [n, 2] fp64, chosen and rejected, in nats.

        Args:
            pairs: datasets.Dataset with prompt_ids, chosen_ids, rejected_ids.
            name: of the dataset, for messages.
            scorer: makes rows that the store lacks; None where the reference is gone.
            batches: says which answers share a call of the scorer.
            sum_over_ranks: adds up counts, so that the report is of all ranks.
            exchange: where ranks run the scorer together, each with a part of its model.

        Raises:
            MissingRowsError: a row is missing and there is no scorer.
            ReferenceStoreError: the store is damaged.
        """
        answers = read_answers(pairs)
        if scorer is not None:
            report = build_reference(
                self.namespace,
                answers,
                scorer,
                batches=batches,
                ranks=self.ranks,
                options=BuildOptions(detail=self.detail, rescore=self.rescore),
                description=f"reference log-probs ({name})",
                exchange=exchange,
            )
            rows, passes = sum_over_ranks([report.rows_scored, report.forward_passes])
            self.reports[name] = replace(report, rows_scored=rows, forward_passes=passes)
            return reference_logps(self.namespace, answers)
        try:
            logps = reference_logps(self.namespace, answers)
            needed = len(answers.first)
            self.reports[name] = ReferenceReport(needed, needed, 0, 0, 0.0)
            return logps
        except MissingRowsError as error:
            raise MissingRowsError(
                f"{error} They can't be made now: without a ref_model the reference is the policy "
                "as it stood before step 1, and it has moved since. Give this dataset to the "
                "trainer before training, or pass that model as ref_model."
            ) from error

    def totals(self) -> ReferenceReport | None:
        """All datasets' reports added up; None before the first."""
        total = None
        for report in self.reports.values():
            if total is None:
                total = report
                continue
            total = replace(
                total,
                rows_needed=total.rows_needed + report.rows_needed,
                rows_found=total.rows_found + report.rows_found,
                rows_scored=total.rows_scored + report.rows_scored,
                forward_passes=total.forward_passes + report.forward_passes,
                seconds=total.seconds + report.seconds,
            )
        return total
