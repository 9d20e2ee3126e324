"""Makes the rows of a dataset that the store lacks, and reads them for the trainer."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Protocol

import numpy as np
from tqdm.auto import tqdm

from dpofast.errors import MissingRowsError, ReferenceStoreError
from dpofast.reference.build.answers import PairAnswers
from dpofast.reference.build.batches import Batch, Batches
from dpofast.reference.build.missing import why_missing
from dpofast.reference.build.ranks import Exchange, Ranks, on_all_ranks
from dpofast.reference.store.namespace import Namespace
from dpofast.reference.store.row_detail import RowDetail
from dpofast.reference.store.writer import Writer

logger = logging.getLogger(__name__)

COMMIT_TOKENS = 1 << 24  # 64 MiB of log-probs wait in memory at most


class Scorer(Protocol):
    """A model that gives log-probs."""

    def __call__(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[np.ndarray]:
        """One model call over (prompt ids, answer ids).

        Returns:
            For each sequence the log-probs of its answer's tokens, in nats: [num_tokens] fp32, or
            fp64 where the sum is to keep more; or [2, num_tokens], the log-sum-exps of the logits
            below them.
        """


@dataclass(frozen=True)
class BuildOptions:
    """How a build goes about its work; the rows don't depend on it but for rounding.

    Attributes:
        commit_rows, commit_seconds: what is scored is committed after so many rows, or seconds: a
            killed build loses that much work at most (and the call it was in).
        progress: show a bar, on rank 0, where there is something to score.
        detail: what is stored of each row.
        rescore: take a row that the store has in less detail for missing.
    """

    commit_rows: int = 4096
    commit_seconds: float = 30.0
    progress: bool = True
    detail: RowDetail = RowDetail.LOGPS
    rescore: bool = True


@dataclass(frozen=True)
class ReferenceReport:
    """What a build did; an answer that stands in several pairs counts once.

    Attributes:
        rows_needed: different answers of the dataset.
        rows_found: of these, in the store before, in the detail that was asked for.
        rows_scored: by this process.
        forward_passes: model calls of this process, those for other ranks' sake alone included.
        seconds: of wall time.
        reason: why rows were missing, in words; empty where none were.
    """

    rows_needed: int
    rows_found: int
    rows_scored: int
    forward_passes: int
    seconds: float
    reason: str = ""


def build_reference(
    namespace: Namespace,
    answers: PairAnswers,
    scorer: Scorer,
    *,
    batches: Batches,
    ranks: Ranks | None = None,
    options: BuildOptions | None = None,
    description: str = "reference log-probs",
    exchange: Exchange | None = None,
) -> ReferenceReport:
    """Score the answers that are missing from `namespace`; afterwards it has all of them.

    With `options.rescore` it also has them all in `options.detail`.

    All ranks call this together, with the same answers. If the build stops with any exception,
    the answers scored so far are committed first.

    Args:
        namespace: of the reference that `scorer` is.
        answers: dataset's answers, from `read_answers`.
        scorer: makes the log-probs.
        batches: says which answers share a model call, such as `BatchesOfTokens`.
        ranks: by default this process alone.
        description: for the progress bar and the log.
        exchange: where each rank holds a part of the model only. The scorer is then called equally
            often on all ranks, and where one can't go on, all stop.

    Raises:
        ReferenceStoreError: a log-prob is NaN or infinite (the row is named), the scorer returned
            something else, or the store can't be read or written.
    """
    ranks, options = ranks or Ranks(), options or BuildOptions()
    started = time.monotonic()
    least = options.detail if options.rescore else RowDetail.SUMS
    missing = on_all_ranks(lambda: _missing(namespace, answers, least), exchange)
    needed, found = len(answers.first), len(answers.first) - len(missing)
    held = namespace.contains(answers.keys[missing])
    reason = why_missing(namespace, found, held, least) if len(missing) else ""
    if ranks.rank == 0:
        tail = f" ({reason})" if reason else "; no forward pass of the reference"
        enough = f" with {least.added_values}" if held.any() else ""
        logger.info(
            "%s: %d answers needed, %d in the store%s, %d to score%s",
            description, needed, found, enough, len(missing), tail,
        )  # fmt: skip
    # Nobody commits before all have seen the same rows missing, so that the shares fit together.
    ranks.barrier()
    build = _Build(namespace, answers, scorer, ranks.rank, options, exchange)
    build.run(batches(answers, missing)[ranks.rank :: ranks.world_size], description)
    ranks.barrier()
    # Where another job wrote at the same time, or ranks don't share the folder, rows may be left.
    missing = on_all_ranks(lambda: _missing(namespace, answers, least), exchange)
    build.run(batches(answers, missing), description)
    namespace.refresh()
    seconds = time.monotonic() - started
    return ReferenceReport(needed, found, build.rows_scored, build.forward_passes, seconds, reason)


def reference_logps(namespace: Namespace, answers: PairAnswers) -> np.ndarray:
    """Summed reference log-probs of each pair: [n, 2] fp64, chosen and rejected, in nats.

    Raises:
        MissingRowsError: rows are missing.
        ReferenceStoreError: rows are damaged.
    """
    namespace.refresh()
    logps, found = namespace.lookup(answers.keys)
    if not found.all():
        lost = np.flatnonzero(~found)
        raise MissingRowsError(
            f"The reference store {namespace.store_folder} lacks {len(lost)} of {len(found)} "
            f"reference log-probs, the first of {answers.name(int(lost[0]))}: "
            f"{why_missing(namespace, int(found.sum()))}."
        )
    return logps.reshape(-1, 2)


def _missing(namespace: Namespace, answers: PairAnswers, detail: RowDetail) -> np.ndarray:
    """Of the different answers, those that lack in this detail by now: [m] int64, sorted by key."""
    namespace.refresh()
    rows: np.ndarray = answers.first[~namespace.contains(answers.keys[answers.first], detail)]
    return rows


class _Build:
    """Scores batches of answers and commits them as it goes."""

    def __init__(
        self,
        namespace: Namespace,
        answers: PairAnswers,
        scorer: Scorer,
        rank: int,
        options: BuildOptions,
        exchange: Exchange | None,
    ) -> None:
        self.namespace, self.answers, self.scorer = namespace, answers, scorer
        self.rank, self.options, self.exchange = rank, options, exchange
        self.rows_scored = self.forward_passes = 0

    def run(self, batches: list[Batch], description: str) -> None:
        """Score and commit; on an exception commit what was scored, then let it pass."""
        exchange = self.exchange
        rounds = len(batches) if exchange is None else max(exchange(len(batches)))
        if not rounds:
            return
        detail = self.options.detail
        writer = on_all_ranks(lambda: self.namespace.writer(self.rank, detail), exchange)
        self._next_commit = time.monotonic() + self.options.commit_seconds
        try:
            for batch in self._with_progress(batches, rounds, description):
                scored = self._forward(self._shortest() if batch is None else batch.answers)
                if batch is None:
                    on_all_ranks(lambda: None, exchange)
                else:
                    keep = partial(self._keep, batch.answers.tolist(), scored, writer)
                    on_all_ranks(keep, exchange)
            on_all_ranks(writer.commit, exchange)
        finally:
            writer.commit()

    def _shortest(self) -> np.ndarray:
        """Answers for a rank that only has to call the model as often as the others."""
        place = self.answers.lengths(self.answers.first).argmin()
        return self.answers.first[place : place + 1]

    def _forward(self, batch: np.ndarray) -> list[np.ndarray]:
        self.forward_passes += 1
        return self.scorer([self.answers.ids(answer) for answer in batch.tolist()])

    def _keep(self, batch: list[int], scored: list[np.ndarray], writer: Writer) -> None:
        """Hand log-probs to the writer, and commit when it is time."""
        got = [np.shape(per_token_scores)[-1] for per_token_scores in scored]
        expected = [len(self.answers.ids(answer)[1]) for answer in batch]
        if got != expected:
            raise ReferenceStoreError(
                f"The scorer returned {got} log-probs for answers of {expected} tokens; it must "
                "give one for each token of each answer."
            )
        refused = None
        for answer, scores in zip(batch, scored, strict=True):
            try:
                key = self.answers.keys[answer].tobytes()
                writer.add(key, scores, self.answers.name(answer))
                self.rows_scored += 1
            except ReferenceStoreError as error:
                refused = refused or error  # the others of this call are kept first
        if refused is not None:
            raise refused
        if (
            writer.pending_rows >= self.options.commit_rows
            or writer.pending_tokens >= COMMIT_TOKENS
            or time.monotonic() >= self._next_commit
        ):
            writer.commit()
            self._next_commit = time.monotonic() + self.options.commit_seconds

    def _with_progress(
        self, batches: list[Batch], rounds: int, description: str
    ) -> Iterator[Batch | None]:
        """Batches, with a bar that counts tokens: the time left is right though lengths fall.

        Where there are more rounds than batches, each further one is None.
        """
        num_answers = sum(len(batch.answers) for batch in batches)
        with tqdm(
            total=sum(batch.num_tokens for batch in batches),
            desc=f"{description}, {num_answers} answers",
            unit=" tokens",
            unit_scale=True,
            disable=not self.options.progress or self.rank != 0,
        ) as bar:
            for batch in batches:
                yield batch
                bar.update(batch.num_tokens)
            yield from repeat(None, rounds - len(batches))
