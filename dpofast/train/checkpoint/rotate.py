"""Deletes old checkpoints, as save_total_limit says."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from dpofast.train.checkpoint.resume import step_folders, why_not_whole
from dpofast.train.checkpoint.staging import delete

logger = logging.getLogger(__name__)


def rotate(
    run_dir: str | Path,
    run_id: str,
    limit: int | None,
    kept: Collection[str | Path | None] = (),
    *,
    keep_newest: bool = True,
) -> list[Path]:
    """Delete the oldest checkpoints of a run until `limit` whole ones are left.

    Damaged ones and those of other runs stay, and don't count.

    Args:
        run_dir: folder that has the `checkpoint-N`.
        run_id: the run.
        limit: save_total_limit; None or 0 keeps all.
        kept: checkpoints that stay in any case, such as the best one.
        keep_newest: whether the newest whole checkpoint stays in any case, too.

    Returns:
        The folders that were deleted, or can't be, which is logged.
    """
    if not limit or limit < 0:
        return []
    # A file of another size is noticed; reading all files at every save would take too long.
    whole = [
        path for path in step_folders(run_dir) if why_not_whole(path, run_id, hashes=False) is None
    ]
    protected = {Path(path).resolve() for path in kept if path}
    if keep_newest:
        protected |= {path.resolve() for path in whole[:1]}
    deleted: list[Path] = []
    num_left = max(limit, sum(path.resolve() in protected for path in whole))
    for path in reversed(whole):
        if len(whole) - len(deleted) <= num_left:
            break
        if path.resolve() not in protected:
            _try_to_delete(path)
            deleted.append(path)
    return deleted


def _try_to_delete(checkpoint: Path) -> None:
    try:
        delete(checkpoint)
    except OSError as error:
        logger.warning("%s can't be deleted (%s), as save_total_limit asks.", checkpoint, error)
