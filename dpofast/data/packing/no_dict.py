"""Answers code that takes a batch for a dict of padded tensors, as TRL's batches are."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from dpofast.errors import ConfigError


class NoDict:
    """A batch whose access as a dict is one error, which says what the batch is.

    Attributes:
        WHAT: what the batch is and where to go, as the message goes on after the name of the class.
    """

    WHAT: ClassVar[str]

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        wanted = f", so it has no {args[0]!r}" if args and isinstance(args[0], str) else ""
        kind = type(self).__name__
        raise ConfigError(f"{kind}: a batch is no dict of padded tensors here{wanted}. {self.WHAT}")

    __getitem__ = __setitem__ = __delitem__ = __iter__ = __contains__ = _refuse
    # `**batch` calls keys, and the others are what code does with such a dict.
    keys = values = items = get = pop = update = setdefault = copy = _refuse
