"""Adds rows to the store: gathered in memory, and committed a segment at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dpofast.errors import ReferenceStoreError
from dpofast.reference.store.keys import as_keys
from dpofast.reference.store.row_detail import RowDetail
from dpofast.reference.store.segments import Columns, FloatLists, write_segment

_KINDS = ("log-prob", "log-sum-exp")


class Writer:
    """Made by `Namespace.writer`."""

    def __init__(self, folder: Path, digest: bytes, rank: int, detail: RowDetail) -> None:
        self._folder, self._digest = folder, digest
        self._rank, self._detail = rank, detail
        self._keys: list[bytes] = []
        self._logps: list[float] = []
        self._num_tokens: list[int] = []
        self._floats: list[np.ndarray] = []  # [2, num_tokens] or fewer rows
        self.pending_tokens = 0

    @property
    def pending_rows(self) -> int:
        return len(self._keys)

    def add(self, key: bytes, scores: np.ndarray, name: str = "") -> None:
        """Take a row; it is safe only after `commit`.

        Args:
            key: 16 bytes.
            scores: [num_tokens] fp32 or fp64, log-probs in nats; or [2, num_tokens], log-sum-exps
                below them. The log-probs are summed in fp64 as they come; what the detail asks for
                is kept in fp32.
            name: of the row, for the error.

        Raises:
            ReferenceStoreError: a number is NaN or infinite; log-sum-exps lack where the detail
                asks for them.
        """
        scores = np.atleast_2d(scores)
        if len(scores) < self._detail:
            raise ReferenceStoreError(
                f"The scores of {name or key.hex()} have no log-sum-exps, which were asked for; "
                "give them as the second row of [2, num_tokens], or store less detail."
            )
        with np.errstate(over="ignore"):  # what float32 can't hold is refused as infinite
            floats = np.asarray(scores[: max(1, self._detail)], np.float32)
        if not np.isfinite(floats).all():
            kind, bad = np.argwhere(~np.isfinite(floats))[0].tolist()
            raise ReferenceStoreError(
                f"The reference's {_KINDS[kind]} of {name or key.hex()} is {floats[kind, bad]} at "
                f"the answer's token {bad}, and is not stored: check the model's weights and its "
                "dtype (float16 overflows where bfloat16 doesn't), or leave that row out."
            )
        self._keys.append(key)
        self._logps.append(float(np.sum(scores[0], dtype=np.float64)))
        self._num_tokens.append(floats.shape[1])
        self._floats.append(floats[: self._detail])
        self.pending_tokens += floats.shape[1]

    def commit(self) -> int:
        """Write what was added as a segment; -> its rows, which now survive a kill.

        Others see them after their `refresh`, this process's namespace too.

        Raises:
            ReferenceStoreError: the disk is full or can't be written; the rows are kept in memory,
                so that another `commit` can follow.
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
