"""Spreads the pairs of an optimizer step over packed rows with nearly equal token counts.

No pair moves to another step; this module only decides the rank and micro-batch of each pair. Ranks
run a micro-batch together and wait for the fullest row, so the rows should be equal. Rows are
compared by their tokens, which predict the work within 1 % at the lengths of real pairs. Every
rank makes the same plan from the same token counts, without communication.

A "slot" is one micro-batch on all ranks: `world_size` rows. A "bin" is a row that is being filled.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from itertools import accumulate
from typing import NamedTuple

Row = list[int]  # indices into the step's pairs, ascending
PackedStep = list[list[Row]]  # [slot][rank]


class _Item(NamedTuple):
    """A pair to be placed; `pair` is its index in the step. Items sort by tokens, then by pair."""

    tokens: int
    pair: int


_Bin = list[_Item]  # ascending; holds _NOTHING, too

# Every bin holds this item. Moving an item to another bin is then a swap with nothing.
_NOTHING = _Item(0, -1)

# Limit on the swaps of one refinement. Real steps need fewer, so it only bounds the time.
_MAX_SWAPS = 400
# Bins that are tried for a swap, the emptiest first, once one is found that helps.
_MOST_TRIED = 64
# Limit on one search, which keeps it to a few milliseconds. Placing one item costs about
# 4 + number of bins. In trials, this was always enough to finish the search of ten pairs.
_SEARCH_EFFORT = 10_000


@dataclass(frozen=True)
class PackFigures:
    """How well some steps are packed.

    Attributes:
        steps: number of steps.
        micro_batches: rows on all ranks in all steps, empty rows included.
        tokens: tokens in all rows.
        fill: tokens divided by the capacity of the rows; can exceed 1 if pairs are over the cap.
        imbalance_mean: fullest row of a step divided by its mean row, averaged over the steps.
        imbalance_max: the same ratio in the most uneven step.
        longest: tokens in the longest pair.
        over_cap: number of pairs that are longer than the cap.
    """

    steps: int
    micro_batches: int
    tokens: int
    fill: float
    imbalance_mean: float
    imbalance_max: float
    longest: int
    over_cap: int


def pack_step(tokens: Sequence[int], world_size: int, max_tokens: int) -> PackedStep:
    """Spread one step's pairs over ranks and micro-batches with nearly equal token counts.

    All ranks get the same number of micro-batches: the smallest for which every row fits. Finding
    it is a bin-packing problem. The result is exact up to about ten pairs. With more pairs, the
    search can give up early, which costs one micro-batch more than necessary.

    Args:
        tokens: tokens that each pair adds to a row, 1 or more.
        world_size: number of ranks.
        max_tokens: most tokens in a row. A longer pair gets a row of its own, which doesn't raise
            the cap for the other rows.
    Returns:
        [micro-batch][rank] -> indices into `tokens`, ascending; empty for a rank without pairs.
        The fullest rows come first.
    Raises:
        ValueError: an argument is below 1.
    """
    _check(tokens, world_size, max_tokens)
    own_rows = [[pair] for pair, count in enumerate(tokens) if count > max_tokens]
    items = sorted(
        (_Item(count, pair) for pair, count in enumerate(tokens) if count <= max_tokens),
        key=lambda item: (-item.tokens, item.pair),
    )
    num_rows = len(own_rows) + _fewest_bins(items, max_tokens)
    rows = own_rows + _in_few_slots(
        lambda num_slots: _fit(items, world_size * num_slots - len(own_rows), max_tokens),
        max(1, _ceil_div(num_rows, world_size)),
    )
    # Rows of similar size share a slot, because all ranks wait for the fullest row in it.
    rows.sort(key=lambda row: (-sum(tokens[pair] for pair in row), row))
    slots = [rows[start : start + world_size] for start in range(0, len(rows), world_size)]
    # Rows now descend within each slot. Reversing every other slot evens out the ranks' totals.
    for slot in slots[1::2]:
        slot.reverse()
    return slots


def pack_figures(steps: Iterable[tuple[Sequence[int], PackedStep]], max_tokens: int) -> PackFigures:
    """Sum up how well steps are packed.

    Args:
        steps: for each step, its pairs' token counts and the result of `pack_step`. An incomplete
            last step is often uneven, because it has too few pairs to balance.
        max_tokens: the cap under which they were packed.
    """
    num_steps = micro_batches = total = longest = over_cap = 0
    imbalances = []
    for tokens, slots in steps:
        rows = [sum(tokens[pair] for pair in row) for slot in slots for row in slot]
        num_steps += 1
        micro_batches += len(rows)
        total += sum(rows)
        longest = max(longest, *tokens, 0)
        over_cap += sum(count > max_tokens for count in tokens)
        if sum(rows):
            imbalances.append(max(rows) * len(rows) / sum(rows))
    return PackFigures(
        steps=num_steps,
        micro_batches=micro_batches,
        tokens=total,
        fill=total / (micro_batches * max_tokens) if micro_batches else 0.0,
        imbalance_mean=sum(imbalances) / len(imbalances) if imbalances else 1.0,
        imbalance_max=max(imbalances, default=1.0),
        longest=longest,
        over_cap=over_cap,
    )


def _check(tokens: Sequence[int], world_size: int, max_tokens: int) -> None:
    for name, value in (("world_size", world_size), ("max_tokens", max_tokens)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more")
    for pair, count in enumerate(tokens):
        if count < 1:
            raise ValueError(f"pair {pair} of the step has {count} tokens; give 1 or more")


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _size(items: Iterable[_Item]) -> int:
    return sum(item.tokens for item in items)


def _in_few_slots(fit: Callable[[int], list[Row] | None], lowest: int) -> list[Row]:
    """The rows that `fit` finds for so few slots that it finds none for one slot less.

    Args:
        fit: makes the rows for a number of slots, or None. It finds some for every large number.
        lowest: least number of slots.
    """
    failed, step = lowest - 1, 1
    while (found := fit(failed + step)) is None:
        failed, step = failed + step, 2 * step
    while step > 1:  # the number found is failed + step
        half = step // 2
        rows = fit(failed + half)
        if rows is None:
            failed, step = failed + half, step - half
        else:
            found, step = rows, half
    return found


def _fewest_bins(items: list[_Item], max_tokens: int) -> int:
    """A number of bins that no filling under the cap can do without; `items` are longest first.

    An item of more than half the cap has a bin for itself, and the items that are too long for the
    rest of it need others (the bound L2 of Martello and Toth, "Knapsack Problems", 1990).
    """
    sums = [0, *accumulate(item.tokens for item in items)]
    sizes = [-item.tokens for item in items]  # ascending
    num_large = bisect_left(sizes, -(max_tokens // 2))  # of more than half the cap
    most = _ceil_div(sums[-1], max_tokens)
    for end in range(num_large, len(items) + 1):  # of the items that are counted
        shortest = items[end - 1].tokens if end > num_large else max_tokens // 2 + 1
        # None of them fits beside the first `alone` items.
        alone = min(num_large, bisect_left(sizes, -(max_tokens - shortest)))
        room = (num_large - alone) * max_tokens - (sums[num_large] - sums[alone])
        rest = sums[end] - sums[num_large] - room
        most = max(most, num_large + _ceil_div(max(rest, 0), max_tokens))
    return most


def _fit(items: list[_Item], num_bins: int, max_tokens: int) -> list[Row] | None:
    """Balanced rows under the cap, or None if none were found; `items` are longest first."""
    bins = _swap_until_even(_fill_emptiest_first(items, num_bins))
    if any(_size(held) > max_tokens for held in bins):
        # Balancing isn't always enough to get under a tight cap. A search tries harder.
        found = _Search(items, num_bins, max_tokens).run()
        if found is None:
            return None
        bins = _swap_until_even(found)
    return [sorted(item.pair for item in held if item is not _NOTHING) for held in bins]


def _fill_emptiest_first(items: list[_Item], num_bins: int) -> list[_Bin]:
    """Put each item, longest first, in the bin that is emptiest at that moment."""
    bins = [[_NOTHING] for _ in range(num_bins)]
    sizes = [(0, index) for index in range(num_bins)]  # a heap
    for item in items:
        size, index = sizes[0]
        insort(bins[index], item)
        heapreplace(sizes, (size + item.tokens, index))
    return bins


def _swap_until_even(bins: list[_Bin]) -> list[_Bin]:
    """Lower the fullest bin by swaps with other bins until no swap helps; changes `bins`.

    A swap never fills another bin above the fullest one, so bins under a cap stay under it.
    """
    by_size = sorted((_size(held), index) for index, held in enumerate(bins))
    for _ in range(_MAX_SWAPS if bins else 0):
        # If several bins are that full, this is the one with the lowest index.
        full, fullest = by_size[bisect_left(by_size, (by_size[-1][0], -1))]
        best_gain = 0
        for tried, (size, other) in enumerate(by_size):
            gap = full - size
            # No swap gains more than half the gap, and the gaps only shrink from here on.
            if gap // 2 <= best_gain or (best_gain and tried >= _MOST_TRIED):
                break
            gain, out, back = _best_swap(bins[fullest], bins[other], gap)
            if gain > best_gain:
                best_gain, best_swap = gain, (size, other, out, back)
        if not best_gain:
            break
        size, other, out, back = best_swap
        for item, source, target in ((out, fullest, other), (back, other, fullest)):
            if item is not _NOTHING:
                bins[source].remove(item)
                insort(bins[target], item)
        moved = out.tokens - back.tokens
        for before, after, index in ((full, full - moved, fullest), (size, size + moved, other)):
            _replace(by_size, (before, index), (after, index))
    return bins


def _replace(ordered: list[tuple[int, int]], old: tuple[int, int], new: tuple[int, int]) -> None:
    """Replace an entry of an ascending list, which stays ascending."""
    del ordered[bisect_left(ordered, old)]
    insort(ordered, new)


def _best_swap(high: _Bin, low: _Bin, gap: int) -> tuple[int, _Item, _Item]:
    """The swap between two bins that lowers the fuller one most.

    Swapping `out` from `high` with `back` from `low` moves m = out - back tokens. Afterwards the
    larger of their new sizes is min(m, gap - m) tokens below the old size of `high`. The ideal m is
    half the gap.

    Returns:
        The tokens by which the fuller bin shrinks, the item from `high` and the item from `low`.
        The first is 0 if no swap helps.
    """
    best_gain, swap = 0, (_NOTHING, _NOTHING)
    for out in high:
        # Only the two items nearest to the ideal `back` can be best; `low` is sorted.
        place = bisect_left(low, (out.tokens - gap // 2, -1))
        for back in low[max(0, place - 1) : place + 1]:
            moved = out.tokens - back.tokens
            gain = min(moved, gap - moved)
            if gain > best_gain:
                best_gain, swap = gain, (out, back)
    return best_gain, *swap


class _Search:
    """Depth-first search for bins that hold all items under the cap.

    Items are placed in order, longest first, because long items have the fewest places to go.
    Each item tries the tightest bin first, which keeps large gaps free for later items. If an item
    fits nowhere, the search takes back the item before it and tries the next bin for that one.

    Args:
        items: at least one item, longest first.
        num_bins: number of bins.
        max_tokens: most tokens in a bin.
    """

    def __init__(self, items: list[_Item], num_bins: int, max_tokens: int) -> None:
        self.items = items
        self.free = [max_tokens] * num_bins  # tokens that each bin can still take
        self.by_room = [(max_tokens, index) for index in range(num_bins)]  # `free`, ascending
        # A bin with less room than the smallest item is wasted.
        self.smallest = items[-1].tokens
        self.usable = max_tokens * num_bins  # tokens that the other bins can still take
        self.unplaced_tokens = _size(items)
        self.bin_of: list[int] = []  # bins of items[0], items[1], ..., as far as they are placed
        # least_room[k]: items[k] has tried all bins with less room. This list has one entry more
        # than `bin_of`, for the item that will be placed next.
        self.least_room = [items[0].tokens]

    def run(self) -> list[_Bin] | None:
        """Filled bins, each with `_NOTHING`; None if no filling fits or the effort is used up."""
        # Placing every item once is always allowed. Beyond that, effort is limited.
        moves = len(self.items) + _SEARCH_EFFORT // (4 + len(self.free))
        for _ in range(moves):
            index = self._next_bin()
            if index is not None:
                self._place_next(index)
                if len(self.bin_of) == len(self.items):
                    return self._filled_bins()
                self.least_room.append(self.items[len(self.bin_of)].tokens)
            elif self.bin_of:
                self._take_back()
            else:
                return None  # the first item has tried all its bins
        return None

    def _next_bin(self) -> int | None:
        """The tightest bin that the next item has yet to try."""
        # If the bins can't hold all unplaced items, this branch of the search can't succeed.
        if self.usable < self.unplaced_tokens:
            return None
        first = bisect_left(self.by_room, (self.least_room[-1], -1))
        if first == len(self.by_room):
            return None
        # Bins with equal room lead to the same result, so only one of them is tried: the last one.
        room = self.by_room[first][0]
        return self.by_room[bisect_left(self.by_room, (room + 1, -1), first) - 1][1]

    def _place_next(self, index: int) -> None:
        tokens = self.items[len(self.bin_of)].tokens
        self.least_room[-1] = self.free[index] + 1
        self.bin_of.append(index)
        self._fill(index, tokens)

    def _take_back(self) -> None:
        self.least_room.pop()
        index = self.bin_of.pop()
        self._fill(index, -self.items[len(self.bin_of)].tokens)

    def _fill(self, index: int, tokens: int) -> None:
        """Add tokens to a bin; fewer than 0 to take them out."""
        before, after = self.free[index], self.free[index] - tokens
        self.free[index] = after
        self.usable += (after if after >= self.smallest else 0) - (
            before if before >= self.smallest else 0
        )
        self.unplaced_tokens -= tokens
        _replace(self.by_room, (before, index), (after, index))

    def _filled_bins(self) -> list[_Bin]:
        bins = [[_NOTHING] for _ in self.free]
        for item, index in zip(self.items, self.bin_of, strict=True):
            insort(bins[index], item)
        return bins
