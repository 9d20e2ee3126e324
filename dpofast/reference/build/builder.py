"""Scores the answers that are missing from the store, and reads all of them back."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Protocol

import numpy as np

from dpofast.columns import LOGP_ROUNDING
from dpofast.errors import MissingRowsError, ReferenceStoreError
from dpofast.progress import progress_bar
from dpofast.reference.build.answers import PairAnswers
from dpofast.reference.build.batches import Batch, Batches
from dpofast.reference.build.missing import why_missing
from dpofast.reference.build.ranks import Exchange, Ranks, on_all_ranks
from dpofast.reference.store.namespace import Namespace
from dpofast.reference.store.row_detail import RowDetail
from dpofast.reference.store.writer import Writer

logger = logging.getLogger(__name__)

# Most tokens whose log-probs wait in memory for a commit: 64 MiB of float32 for each kind of value.
COMMIT_TOKENS = 1 << 24


# For each answer of a model call, the log-probs of its tokens in nats: [num_tokens] fp32, or fp64
# for a more precise sum; or [2, num_tokens], log-probs and log-sum-exps of the logits.
Scores = list[np.ndarray]
# The scores, or a function that waits for the device that makes them and returns them.
Scored = Scores | Callable[[], Scores]


class Scorer(Protocol):
    """A model that makes log-probs."""

    def __call__(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Scored:
        """Score answers in one model call, given the prompt ids and answer ids of each answer."""


@dataclass(frozen=True)
class BuildOptions:
    """How often a build commits, what it shows, and what it stores.

    Attributes:
        commit_rows: number of new rows after which they are committed. A build that is killed loses
            at most the work since the last commit, and the model calls it was in: one, or two on
            a device that the host doesn't wait for.
        commit_seconds: seconds after which new rows are committed.
        progress: whether rank 0 shows a progress bar while it scores.
        logs: whether rank 0 logs what is missing.
        detail: values to store for each new row.
        least: answers that are stored with less detail than this are scored again; None for
            `detail`.
    """

    commit_rows: int = 4096
    commit_seconds: float = 30.0
    progress: bool = True
    logs: bool = True
    detail: RowDetail = RowDetail.LOGPS
    least: RowDetail | None = None


@dataclass(frozen=True)
class ReferenceReport:
    """What a build did. An answer that occurs in several pairs counts once.

    Attributes:
        rows_needed: number of distinct answers in the dataset.
        rows_found: number of them that were in the store before, in the detail asked for.
        rows_scored: number of rows that this process added.
        forward_passes: number of model calls in this process. Calls that it made only because other
            ranks needed its part of the model are included.
        seconds: wall time of the build.
        reason: clause that explains why rows were missing; empty if none were.
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
    """Score the answers that are missing from `namespace`, so that it has all of them.

    Answers stored with less than `options.least` count as missing.

    All ranks must call this at the same time, with the same answers. If the build stops with any
    exception, the answers scored so far are committed first.

    Args:
        namespace: namespace of the reference that `scorer` runs.
        answers: answers of the dataset, from `read_answers`.
        scorer: model that makes the log-probs.
        batches: function that divides the missing answers into model calls, such as
            `BatchesOfTokens`.
        ranks: place of this process among those that share the work; by default it is the only one.
        options: how often to commit, what to show and what to store.
        description: name of the build in the progress bar and the log.
        exchange: function that exchanges objects between the ranks, needed if each rank holds only
            a part of the model. The scorer is then called equally often on all ranks, and all of
            them stop if one can't go on.

    Raises:
        ReferenceStoreError: a log-prob is NaN or infinite (the row is named), the scorer returned
            the wrong number of values, or the store can't be read or written.
    """
    ranks, options = ranks or Ranks(), options or BuildOptions()
    started = time.monotonic()
    least = options.detail if options.least is None else options.least
    missing = on_all_ranks(lambda: _missing(namespace, answers, least), exchange)
    needed, found = len(answers.first), len(answers.first) - len(missing)
    held = namespace.contains(answers.keys[missing])  # stored, but with less detail
    reason = why_missing(namespace, found, held, least) if len(missing) else ""
    if ranks.rank == 0:
        tail = f" ({reason})" if reason else "; no forward pass of the reference"
        enough = f" with {least.added_values}" if held.any() else ""
        logger.log(
            logging.INFO if options.logs else logging.DEBUG,
            "%s: %d answers needed, %d in the store%s, %d to score%s",
            description, needed, found, enough, len(missing), tail,
        )  # fmt: skip
    # All ranks must see the same rows missing before any rank commits, or their shares would not
    # add up to the whole.
    ranks.barrier()
    build = _Build(namespace, answers, scorer, ranks.rank, options, exchange)
    # Neighbouring batches cost about the same, so taking turns gives the ranks equal shares.
    build.run(batches(answers, missing)[ranks.rank :: ranks.world_size], description)
    ranks.barrier()
    # Rows can still be missing here: another job may have written while the ranks looked, so that
    # their shares didn't match, or the ranks don't share the folder.
    missing = on_all_ranks(lambda: _missing(namespace, answers, least), exchange)
    build.run(batches(answers, missing), description)
    namespace.refresh()
    seconds = time.monotonic() - started
    return ReferenceReport(needed, found, build.rows_scored, build.forward_passes, seconds, reason)


def reference_logps(namespace: Namespace, answers: PairAnswers) -> np.ndarray:
    """Read the summed reference log-probs of all pairs.

    Args:
        namespace: namespace of the reference.
        answers: answers of the dataset, from `read_answers`.

    Returns:
        [n, 2] fp64, log-probs of the chosen and the rejected answer of each pair, in nats.

    Raises:
        MissingRowsError: rows are missing.
        ReferenceStoreError: rows are damaged, or a log-prob isn't finite or is above 0.
    """
    namespace.refresh()
    logps, found = namespace.lookup(answers.keys)
    refuse_missing(namespace, answers, found, RowDetail.SUMS)
    refuse_wrong(namespace, answers, logps)
    return logps[answers.pairs]


def refuse_missing(
    namespace: Namespace, answers: PairAnswers, found: np.ndarray, detail: RowDetail
) -> None:
    """Raise MissingRowsError unless each answer has a row of this detail.

    Args:
        namespace: namespace that was searched.
        answers: answers of the dataset.
        found: [a] bool, whether each answer has such a row.
        detail: detail that was asked for.
    """
    if found.all():
        return
    lost = np.flatnonzero(~found)
    held = namespace.contains(answers.keys[lost])  # stored, but with less detail
    raise MissingRowsError(
        f"The reference store {namespace.store_folder} lacks {len(lost)} of {len(found)} "
        f"reference log-probs, the first of {answers.name(int(lost[0]))}: "
        f"{why_missing(namespace, int(found.sum()), held, detail)}."
    )


def refuse_wrong(
    namespace: Namespace, answers: PairAnswers, logps: np.ndarray, scored: np.ndarray | None = None
) -> None:
    """Raise ReferenceStoreError if a log-prob is none: not finite, or above 0.

    Args:
        namespace: namespace that the log-probs were read from.
        answers: answers of the dataset.
        logps: [m] fp64, log-probs.
        scored: [m] int64, the answer of each log-prob; None if they are those of all answers.
    """
    wrong = np.flatnonzero(~(np.isfinite(logps) & (logps <= LOGP_ROUNDING)))
    if wrong.size:
        place = int(wrong[0])
        answer = place if scored is None else int(scored[place])
        raise ReferenceStoreError(
            f"The reference store {namespace.store_folder} has {logps[place]} as the log-prob "
            f"of {answers.name(answer)}, which no reference gives, so something else wrote "
            "it: make a new store (reference_store)."
        )


def _missing(namespace: Namespace, answers: PairAnswers, detail: RowDetail) -> np.ndarray:
    """Find the distinct answers without a row of this detail: [m] int64, sorted by key."""
    namespace.refresh()
    found = namespace.contains(answers.keys[answers.first], detail)
    missing: np.ndarray = answers.first[~found]
    return missing


class _Build:
    """Scores batches of answers, and commits the rows at intervals.

    Attributes:
        rows_scored: number of rows added so far.
        forward_passes: number of model calls so far.
    """

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
        # Answers of calls whose scores are still on the device; the oldest call comes first.
        self._waiting: deque[tuple[list[int], Callable[[], Scores]]] = deque()

    def run(self, batches: list[Batch], description: str) -> None:
        """Score and commit all batches. If anything raises, the rows so far are committed first."""
        exchange = self.exchange
        # If each rank holds a part of the model, every rank takes part in every call. All ranks
        # then make as many calls as the rank with the most batches.
        rounds = len(batches) if exchange is None else max(exchange(len(batches)))
        if not rounds:
            return
        # Making a writer makes the folder, which can fail on one rank only.
        detail = self.options.detail
        writer = on_all_ranks(lambda: self.namespace.writer(self.rank, detail), exchange)
        self._next_commit = time.monotonic() + self.options.commit_seconds
        try:
            for batch in self._with_progress(batches, rounds, description):
                # A rank that has run out of batches still calls the model, because the other ranks
                # need its part of the weights.
                scored = self._forward(self._shortest() if batch is None else batch.answers)
                if batch is None:
                    on_all_ranks(lambda: None, exchange)
                elif exchange is not None or not callable(scored):
                    keep = partial(self._keep, batch.answers.tolist(), scored, writer)
                    on_all_ranks(keep, exchange)
                else:
                    # The device goes on with this call while the scores of the last one are kept.
                    self._waiting.append((batch.answers.tolist(), scored))
                    self._keep_waiting(writer, but=1)
            self._keep_waiting(writer)
            on_all_ranks(writer.commit, exchange)
        except BaseException:
            # The error that stopped the build may be the device's, which then gives no scores.
            with suppress(Exception):
                self._keep_waiting(writer)
            raise
        finally:
            writer.commit()  # does nothing if all rows are committed

    def _keep_waiting(self, writer: Writer, but: int = 0) -> None:
        """Wait for the scores of all calls but the last `but` ones, and keep them."""
        while len(self._waiting) > but:
            self._keep(*self._waiting.popleft(), writer)

    def _shortest(self) -> np.ndarray:
        """Choose the cheapest call for a rank that has no batch left: its shortest answer."""
        place = self.answers.lengths(self.answers.first).argmin()
        return self.answers.first[place : place + 1]

    def _forward(self, batch: np.ndarray) -> Scored:
        """Score answers [m] in one model call, or start it."""
        self.forward_passes += 1
        return self.scorer([self.answers.ids(answer) for answer in batch.tolist()])

    def _keep(self, batch: list[int], scored: Scored, writer: Writer) -> None:
        """Add the scores of a batch to the writer once they are there, and commit if it is time.

        Raises:
            ReferenceStoreError: the scorer returned a wrong number of values, a value isn't finite,
                or the store can't be written.
        """
        if callable(scored):
            scored = scored()
        # The last axis is the tokens, with or without log-sum-exps.
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
                refused = refused or error  # raised once the call's other answers are added
        if refused is not None:
            raise refused
        # Rows and seconds bound what a kill can lose, tokens bound the memory in use.
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
        """Yield the batches, then None for each further round, and show progress.

        The bar counts tokens. Counting answers would mislead, because long ones come first.

        Args:
            batches: batches of this rank.
            rounds: number of model calls that every rank makes.
            description: text before the bar.
        """
        num_answers = sum(len(batch.answers) for batch in batches)
        with progress_bar(
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
