"""Keeps the reports of a run from ending it: a report that fails is a warning."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from dpofast.errors import one_line

logger = logging.getLogger(__name__)

# Events at which a reporter is set up. One that can't be, such as a service without a login, stops
# the run there: before its first step, and while the user still watches.
SET_UP = ("on_init_end", "on_train_begin")


class ReportGuard:
    """Turns failures of reports into warnings, one for each report of a run.

    Training and its saved model are worth more than any report about them. What is guarded must
    not talk to other ranks: a rank that fails before such a call would leave the others waiting.
    """

    def __init__(self) -> None:
        self._failed: set[str] = set()

    @contextlib.contextmanager
    def __call__(self, report: str) -> Iterator[None]:
        """Inside the `with` block, any exception ends the block with a warning.

        Args:
            report: what is reported, as the warning begins with it; after its first failure, the
                same report fails without a further warning.
        """
        try:
            yield
        except Exception as error:
            if report not in self._failed:
                self._failed.add(report)
                reason = f"{type(error).__name__}: {one_line(error)}"
                logger.warning("%s failed (%s); the run goes on without.", report, reason)


def guard_reporters(callbacks: Iterable[TrainerCallback]) -> None:
    """Guard every callback that only reports: progress bars, and transformers' integrations.

    Args:
        callbacks: callbacks of a Trainer, changed in place. Those of the user are left as they are,
            because they may do more than report, and may mean to stop a run.
    """
    reporters = (PrinterCallback, ProgressCallback, *INTEGRATION_TO_CALLBACK.values())
    for callback in callbacks:
        is_guarded = "on_log" in vars(callback)  # by an earlier call of this function
        if type(callback) not in reporters or is_guarded:
            continue
        guard = ReportGuard()
        for event in filter(_is_guarded, dir(callback)):
            setattr(callback, event, _guarded(getattr(callback, event), guard))


def _is_guarded(name: str) -> bool:
    return name.startswith("on_") and name not in SET_UP


def _guarded(method: Callable[..., Any], guard: ReportGuard) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = None
        with guard(type(method.__self__).__name__):  # type: ignore[attr-defined]
            result = method(*args, **kwargs)
        return result

    return call
