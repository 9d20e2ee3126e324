"""Adds rows to a namespace: gathers them in memory, and commits them as segments."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dpofast.columns import LOGP_ROUNDING
from dpofast.errors import ReferenceStoreError
from dpofast.reference.store.keys import as_keys
from dpofast.reference.store.row_detail import RowDetail
from dpofast.reference.store.segments import Columns, FloatLists, write_segment

_KINDS = ("log-prob", "log-sum-exp")  # values along the first axis of the scores


class Writer:
    """Gathers rows and commits them; `Namespace.writer` makes it.

    Args:
        folder: folder of the namespace; it exists.
        digest: 16 bytes of the reference's digest.
        rank: rank of this process, used in the names of segments.
        detail: values to store for each row.

    Attributes:
        pending_tokens: tokens in the rows that wait for the next commit.
    """

    def __init__(self, folder: Path, digest: bytes, rank: int, detail: RowDetail) -> None:
        self._folder, self._digest = folder, digest
        self._rank, self._detail = rank, detail
        self._keys: list[bytes] = []
        self._logps: list[float] = []
        self._num_tokens: list[int] = []
        # One [detail, num_tokens] array per row. Its first axis has the first 0, 1 or 2 of _KINDS.
        self._floats: list[np.ndarray] = []
        self.pending_tokens = 0

    @property
    def pending_rows(self) -> int:
        """Number of rows that wait for the next commit."""
        return len(self._keys)

    def add(self, key: bytes, scores: np.ndarray, name: str = "") -> None:
        """Add a row. It is safe only after the next `commit`.

        Args:
            key: 16 bytes, from `row_key`.
            scores: [num_tokens] fp32 or fp64, log-probs in nats; or [2, num_tokens], log-probs and
                log-sum-exps. The log-probs are summed in fp64 before any rounding. The per-token
                values that the detail asks for are stored in fp32.
            name: name of the row, used in errors; by default its key.

        Raises:
            ReferenceStoreError: a value is NaN or infinite, a log-prob is above 0 by more than
                rounding explains, or the log-sum-exps that the detail
                asks for are missing.
        """
        scores = np.atleast_2d(scores)
        if len(scores) < self._detail:
            raise ReferenceStoreError(
                f"The scores of {name or key.hex()} have no log-sum-exps, which were asked for; "
                "give them as the second row of [2, num_tokens], or store less detail."
            )
        # Values beyond float32's range become infinite here, and are refused below. The log-probs
        # are checked even if only their sum is stored.
        with np.errstate(over="ignore"):
            floats = np.asarray(scores[: max(1, self._detail)], np.float32)
        if not np.isfinite(floats).all():
            kind, bad = np.argwhere(~np.isfinite(floats))[0].tolist()
            raise ReferenceStoreError(
                f"The reference's {_KINDS[kind]} of {name or key.hex()} is {floats[kind, bad]} at "
                f"the answer's token {bad}, and is not stored: check the model's weights and its "
                "dtype (float16 overflows where bfloat16 doesn't), or leave that row out."
            )
        if floats.size and floats[0].max() > LOGP_ROUNDING:
            bad = int(floats[0].argmax())
            raise ReferenceStoreError(
                f"The reference's log-prob of {name or key.hex()} is {floats[0, bad]} at the "
                f"answer's token {bad}, which is above 0, and is not stored: the scorer must "
                "return log-probs, in nats."
            )
        self._keys.append(key)
        self._logps.append(float(np.sum(scores[0], dtype=np.float64)))
        self._num_tokens.append(floats.shape[1])
        self._floats.append(floats[: self._detail])
        self.pending_tokens += floats.shape[1]

    def commit(self) -> int:
        """Write the rows added since the last commit as a new segment.

        From then on they survive a kill. A namespace, in this process or another, sees them after
        its next `refresh`.

        Returns:
            Number of rows written.

        Raises:
            ReferenceStoreError: the disk is full or can't be written. The rows stay in memory, and
                another `commit` tries again.
        """
        num_rows = self.pending_rows
        if not num_rows:
            return 0
        empty = np.empty(0, np.float32)
        logps, logsumexps = (
            FloatLists.of([row[kind] if kind < self._detail else empty for row in self._floats])
            for kind in range(len(_KINDS))
        )
        columns = Columns(
            keys=as_keys(self._keys),
            logps=np.array(self._logps),
            num_tokens=np.array(self._num_tokens, np.int32),
            per_token_logps=logps,
            per_token_logsumexps=logsumexps,
        )
        write_segment(self._folder, self._digest, columns, self._rank)
        self._keys, self._logps, self._num_tokens, self._floats = [], [], [], []
        self.pending_tokens = 0
        return num_rows
