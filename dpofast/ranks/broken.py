"""Tells errors that another rank has caused: the communication with it has broken."""

from __future__ import annotations

from collections.abc import Iterator

from dpofast.errors import RankError


def follows_from_another_rank(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that another rank has gone.

    What loads models or writes checkpoints turns any exception into an error of its own. If the
    exception is that of a broken connection, the error's sentence blames the wrong thing.

    Args:
        error: what ends this rank.
    """
    return any(_is_broken_connection(each) for each in _chain(error))


def _is_broken_connection(error: BaseException) -> bool:
    if isinstance(error, RankError):
        return True
    # By name, so that a command that has no use for PyTorch doesn't import it.
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return True
    # gloo raises a plain RuntimeError; its text begins with the place in gloo's source.
    return isinstance(error, RuntimeError) and "/gloo/" in str(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
