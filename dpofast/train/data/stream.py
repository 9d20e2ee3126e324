"""A training set that is read while the run trains: a window of optimizer steps at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from dpofast.data import (
    PreparationReport,
    TokenStream,
    pairs_fingerprint,
    refuse_nothing_kept,
)
from dpofast.data.packing.plan import StepSampler
from dpofast.errors import DataError
from dpofast.options.config import DPOConfig
from dpofast.train.data.dataset import RunDataset
from dpofast.train.data.sampler import refuse_no_step, train_sampler
from dpofast.train.data.stream_pairs import Place, StreamPairs, TakenPairs
from dpofast.train.exchange import exchange

logger = logging.getLogger(__name__)

WINDOW_PAIRS = 1024  # pairs that are read and scored together, rounded up to whole steps


@dataclass(eq=False)
class Window:
    """Consecutive steps of a run over a stream, all of one pass.

    Attributes:
        first_step: number of the first step in the run, from 0.
        num_steps: number of steps.
        taken: pairs of the steps, and where they are in the stream.
        dataset: the same pairs on their way through the run.
    """

    first_step: int
    num_steps: int
    taken: TakenPairs
    dataset: RunDataset

    @property
    def end(self) -> int:
        """The number of the step after the last one."""
        return self.first_step + self.num_steps


@dataclass(frozen=True)
class Anchor:
    """A window that a checkpoint knows the place of.

    Attributes:
        first_step: number of its first step in the run.
        place: the place of its first pair in the stream.
        pairs: fingerprint of the pairs of its first step; None in checkpoints of early versions.
    """

    first_step: int
    place: Place
    pairs: str | None = None


class RunStream:
    """The training set of a run over a stream.

    All ranks read the whole stream, and each runs its part of every step. Steps are numbered from 0
    through all passes over the stream. A pass ends with a smaller step if its pairs don't fill one,
    or leaves these pairs out (dataloader_drop_last), as an epoch of a dataset does.

    Args:
        name: dataset name, used in messages and reports.
        given: the object that the user passed, by which the stream is recognised later.
        tokens: its pairs.
        config: options of the run; max_steps is set.
        check: refuses pairs that a model of the run can't run.
        world_size: ranks that share a step.

    Attributes:
        pairs_per_step: pairs that an optimizer step takes on all ranks.
        pairs: what transformers' Trainer gets as its dataset.
        sources: empty, as for any dataset that isn't a mixture.
        plan: steps of the first window that was planned; None until then.
        brings_ref_logps: whether the first pairs come with reference log-probs of their own.
        next_step: the step that follows the last one that was laid out.

    Raises:
        DataError: the first rows can't be used, or the stream has no pair.
        ConfigError: the pairs don't fill a step, and dataloader_drop_last is set.
    """

    def __init__(
        self,
        name: str,
        given: Any,
        tokens: TokenStream,
        config: DPOConfig,
        check: Callable[[RunDataset], None],
        world_size: int,
    ) -> None:
        self.name, self.given, self.pairs = name, given, given
        self.tokens, self.config = tokens, config
        self.pairs_per_step = int(config.pairs_per_rank * world_size)
        self.sources: dict[str, int] = {}
        self.plan: StepSampler | None = None
        self.next_step = 0
        self._check = check
        self._source = StreamPairs(tokens)
        self._anchor: Anchor | None = None  # a window that can be gone to
        self._epoch_has_steps = False
        self._window: Window | None = None
        self._first_step = 0  # of the window that is read next, if there is none
        self.brings_ref_logps = self.window(0).dataset.brings_ref_logps

    @property
    def num_steps(self) -> int:
        """The optimizer steps of the run."""
        return int(self.config.max_steps)

    @property
    def report(self) -> PreparationReport:
        """What became of the rows that this process has read."""
        return self.tokens.report()

    @property
    def progress(self) -> dict[str, int]:
        """How far the stream was read: passes before this one, and rows of this one."""
        return {"epoch": self.tokens.epoch, "row": self.tokens.row}

    def window(self, step: int) -> Window:
        """The window that a step belongs to. All ranks must ask for the same step.

        Going back, or beyond the next window, reads the stream again.

        Raises:
            DataError: rows can't be used or read, or the ranks read different ones.
        """
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step {step} is not one of the run's {self.num_steps}")
        if self._window is None or not self._window.first_step <= step <= self._window.end:
            self._go_before(step)
        while self._window is None or step >= self._window.end:
            first = self._first_step if self._window is None else self._window.end
            self._window = None  # if reading fails, a later call begins anew
            self._window = _on_all_ranks(partial(self._read_window, first), self.config.world_size)
        return self._window

    def first_pass(self) -> Iterator[Window]:
        """The windows of the run up to the end of the stream's first pass."""
        step = 0
        while step < self.num_steps:
            window = self.window(step)
            if self.tokens.epoch:
                return
            yield window
            step = window.end

    def has_more(self, step: int) -> bool:
        """Whether the run reads on beyond the window of a step."""
        return self.window(step).end < self.num_steps

    def recorded(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of the stream: where the window that was read last begins.

        The resumed run reads the same windows, and so scores the same answers together. None if the
        stream has been read elsewhere since the last step.
        """
        window, step = self._window, self.next_step
        if window is None or not window.first_step <= step <= window.end:
            return None
        anchor = Anchor(window.first_step, window.taken.start, self._fingerprint(window.taken))
        return {"next_step": step, **asdict(anchor), "options": self._options()}

    def resume(self, recorded: dict[str, Any] | None) -> int:
        """Let later calls of `window` go to where a checkpoint stands without reading up to it.

        Args:
            recorded: what `recorded` returned; None if the checkpoint has none. Without it, and
                with other options, the stream is read from its beginning.

        Returns:
            The step from which the run goes on.

        Raises:
            DataError: the stream gives other pairs there; `window` raises it if it hasn't read them
                yet.
        """
        if self.config.ignore_data_skip or not recorded:
            return 0
        if recorded["options"] != self._options():
            return 0
        place = Place(**recorded["place"])
        self._anchor = Anchor(int(recorded["first_step"]), place, recorded.get("pairs"))
        if self._window is not None:
            self._check_anchor(self._window.first_step, self._window.taken)
        return int(recorded["next_step"])

    def _fingerprint(self, taken: TakenPairs) -> str:
        """The fingerprint of the first step of some pairs."""
        pairs = taken.pairs
        return pairs_fingerprint(pairs.select(range(min(len(pairs), self.pairs_per_step))))

    def _check_anchor(self, first_step: int, taken: TakenPairs) -> None:
        """Raise DataError if these pairs of a step aren't those that a checkpoint knows."""
        anchor = self._anchor
        if anchor is None or anchor.first_step != first_step or anchor.pairs is None:
            return
        if self._fingerprint(taken) != anchor.pairs:
            raise DataError(
                f"{self.name}: from row {taken.start.row} of pass {taken.start.epoch} on (both "
                "counted from 0), the stream gives other pairs than in the run that is resumed. It "
                "must give the same rows in the same order: give shuffle a seed. To begin with the "
                "stream's first row instead, set ignore_data_skip: true."
            )

    def _options(self) -> dict[str, Any]:
        """The options by which pairs come to their steps."""
        config = self.config
        return {
            "pairs_per_step": self.pairs_per_step,
            "drop_last": config.dataloader_drop_last,
            **vars(config.length_limits()),
        }

    def _go_before(self, step: int) -> None:
        """Go to the nearest place from which reading on leads to a step."""
        now = 0 if self._window is None else self._window.end
        place, first = Place(), 0
        if self._anchor is not None and self._anchor.first_step <= step:
            first, place = self._anchor.first_step, self._anchor.place
        if first <= now <= step and self._window is not None:
            return
        self._source.start(place)
        self._epoch_has_steps = place != Place(place.epoch)
        self._window, self._first_step = None, first

    def _read_window(self, first_step: int) -> Window:
        size = self.pairs_per_step
        steps = min(-(-WINDOW_PAIRS // size), self.num_steps - first_step)
        while True:
            taken = self._source.take(steps * size)
            if taken is not None:
                found = self._num_steps_of(len(taken.pairs))
                if found:
                    break
                if not self._epoch_has_steps:
                    refuse_no_step(len(taken.pairs), size)
            self._next_epoch(first_step)
        self._epoch_has_steps = True
        self._check_anchor(first_step, taken)
        dataset = RunDataset(self.name, None, taken.pairs, self.report, is_window=True)
        self._check(dataset)
        return Window(first_step, found, taken, dataset)

    def _num_steps_of(self, num_pairs: int) -> int:
        """The steps that the next pairs of a pass make."""
        ranks = (0, self.pairs_per_step // self.config.pairs_per_rank)
        return len(train_sampler(self.config, num_pairs, None, ranks))

    def _next_epoch(self, step: int) -> None:
        """Go back to the beginning of the stream, if it has given a step."""
        epoch = self.tokens.epoch
        if not self._epoch_has_steps:
            if epoch == 0:
                report = self.report
                if not report.pairs_read:
                    raise DataError(f"{self.name} holds no rows; give it at least one pair.")
                refuse_nothing_kept(report)
            raise DataError(
                f"{self.name}: the stream gave {step} steps, and nothing when it was read again, "
                f"but max_steps is {self.num_steps}; lower max_steps, or give a stream that begins "
                "again."
            )
        logger.info("%s: the stream has ended after %d steps, and begins again.", self.name, step)
        self._source.start(Place(epoch + 1))
        self._epoch_has_steps = False


def _on_all_ranks(read: Callable[[], Window], world_size: int) -> Window:
    """Read a window on all ranks, and raise on all of them if one can't or has read other pairs."""
    if world_size == 1:
        return read()
    try:
        window = read()
    except Exception as error:
        exchange((None, str(error) or type(error).__name__))
        raise
    found = exchange((pairs_fingerprint(window.taken.pairs), None))
    for rank, (_, message) in enumerate(found):
        if message is not None:
            raise DataError(f"Rank {rank} can't read the stream: {message}")
    if len({fingerprint for fingerprint, _ in found}) > 1:
        raise DataError(
            f"{window.dataset.name}: the ranks read different pairs from the stream. Every rank "
            "must get all of it, in the same order, and takes its own part of each step: don't "
            "split the stream by rank, and give shuffles a seed."
        )
    return window
