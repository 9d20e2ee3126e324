"""Which pairs of an optimizer step share a row, on which rank and in which micro-batch.

A step keeps exactly its pairs; this module only spreads them. Rows are balanced by their tokens,
because all ranks wait for the fullest row of a micro-batch, and tokens tell the work within 1 %
at the lengths of real pairs. Every rank makes the same plan from the same token counts.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heapreplace

Row = list[int]  # positions among the step's pairs, ascending
PackedStep = list[list[Row]]  # [micro-batch][rank]

# (tokens, position); `_NOTHING` lies in every bin, so that a move is a swap against nothing.
_Item = tuple[int, int]
_NOTHING: _Item = (0, -1)

# Exchanges of one refinement: real steps need fewer, so this bounds the time alone.
_MAX_EXCHANGES = 400
# Bounds one search to some milliseconds: a placement costs about (4 + bins) units. Steps of ten
# pairs, drawn to be hard, were all searched to the end.
_SEARCH_EFFORT = 10_000


@dataclass(frozen=True)
class PackFigures:
    """How well steps are packed.

    Attributes:
        steps: that were packed.
        micro_batches: rows of all ranks and steps, empty ones included.
        tokens: tokens of all pairs.
        fill: tokens over what the rows may hold; above 1 where pairs are longer than the cap.
        imbalance_mean: of a step, the fullest row over the mean row, averaged over the steps.
        imbalance_max: the same of the most uneven step.
        longest: tokens of the longest pair.
        over_cap: pairs longer than the cap.
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
    """Spread one step's pairs over ranks and micro-batches of nearly equal token counts.

    The number of micro-batches is the same on all ranks and the smallest for which every row
    fits. To find it is bin packing: exact for about ten pairs; with more, rows that neither
    balancing nor a search of bounded effort finds cost a micro-batch too many.

    Args:
        tokens: of each pair in the row, 1 or more.
        world_size: ranks that share the step.
        max_tokens: of a row. A longer pair gets a row of its own and loosens no other row.
    Returns:
        [micro-batch][rank] -> positions into `tokens`, in ascending order; empty for a rank
        without pairs. The fullest rows come first.
    Raises:
        ValueError: an argument is below 1.
    """
    _check(tokens, world_size, max_tokens)
    own_rows = [[position] for position, count in enumerate(tokens) if count > max_tokens]
    items = sorted(
        ((count, position) for position, count in enumerate(tokens) if count <= max_tokens),
        key=lambda item: (-item[0], item[1]),
    )
    num_rows = len(own_rows) + _ceil_div(sum(count for count, _ in items), max_tokens)
    num_slots = max(1, _ceil_div(num_rows, world_size))
    while (rows := _fit(items, world_size * num_slots - len(own_rows), max_tokens)) is None:
        num_slots += 1

    # Rows of similar size share a micro-batch: there, all ranks wait for the fullest.
    rows = own_rows + rows
    rows.sort(key=lambda row: (-sum(tokens[position] for position in row), row))
    slots = [rows[start : start + world_size] for start in range(0, len(rows), world_size)]
    for slot in slots[1::2]:  # to and fro, so that the ranks' totals come out even, too
        slot.reverse()
    return slots


def figures(steps: Iterable[tuple[Sequence[int], PackedStep]], max_tokens: int) -> PackFigures:
    """Sum up packed steps.

    Args:
        steps: the token counts of each step's pairs, and what `pack_step` made of them. A last
            step with fewer pairs than the others may be uneven for want of pairs.
        max_tokens: the cap they were packed under.
    """
    num_steps = micro_batches = total = longest = over_cap = 0
    imbalances = []
    for tokens, slots in steps:
        rows = [sum(tokens[position] for position in row) for slot in slots for row in slot]
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
    for position, count in enumerate(tokens):
        if count < 1:
            raise ValueError(f"pair {position} of the step has {count} tokens; give 1 or more")


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _fit(items: list[_Item], num_bins: int, max_tokens: int) -> list[Row] | None:
    """Balanced rows under the cap, or None where none are found; `items` longest first."""
    bins = _refine(_longest_first(items, num_bins))
    if any(_size(row) > max_tokens for row in bins):
        found = _search(items, num_bins, max_tokens)
        if found is None:
            return None
        bins = _refine(found)
    return [sorted(item[1] for item in row if item is not _NOTHING) for row in bins]


def _size(row: list[_Item]) -> int:
    return sum(count for count, _ in row)


def _longest_first(items: list[_Item], num_bins: int) -> list[list[_Item]]:
    """Each item to the emptiest bin. -> bins, ascending, with `_NOTHING` in each."""
    bins = [[_NOTHING] for _ in range(num_bins)]
    sizes = [(0, index) for index in range(num_bins)]  # a heap
    for item in items:
        size, index = sizes[0]
        insort(bins[index], item)
        heapreplace(sizes, (size + item[0], index))
    return bins


def _refine(bins: list[list[_Item]]) -> list[list[_Item]]:
    """Swap items of the fullest bin against smaller ones until no swap lowers it; in place.

    No bin ever exceeds the fullest one, so bins under a cap stay under it.
    """
    sizes = [_size(row) for row in bins]
    for _ in range(_MAX_EXCHANGES):
        fullest = max(range(len(bins)), key=sizes.__getitem__, default=0)
        best = 0
        for other in sorted(range(len(bins)), key=sizes.__getitem__):
            gap = sizes[fullest] - sizes[other]
            if gap // 2 <= best:  # nor will the fuller ones that follow do better
                break
            gain, out, back = _best_swap(bins[fullest], bins[other], gap)
            if gain > best:
                best, swap = gain, (other, out, back)
        if not best:
            break
        other, out, back = swap
        for item, source, target in ((out, fullest, other), (back, other, fullest)):
            if item is not _NOTHING:
                bins[source].remove(item)
                insort(bins[target], item)
                sizes[source] -= item[0]
                sizes[target] += item[0]
    return bins


def _best_swap(high: list[_Item], low: list[_Item], gap: int) -> tuple[int, _Item, _Item]:
    """The swap after which the fuller of two bins is lowest: -> gain, item of high, item of low.

    A swap moves the difference of its items; best is half the gap. A gain of 0 is none.
    """
    best, swap = 0, (_NOTHING, _NOTHING)
    for out in high:
        place = bisect_left(low, (out[0] - gap // 2, -1))
        for back in low[max(0, place - 1) : place + 1]:
            moved = out[0] - back[0]
            gain = min(moved, gap - moved)
            if gain > best:
                best, swap = gain, (out, back)
    return best, *swap


def _search(items: list[_Item], num_bins: int, max_tokens: int) -> list[list[_Item]] | None:
    """Depth-first search for bins under the cap, each item to the tightest bin first.

    -> bins as in `_longest_first`; None where there are none, or where the effort is spent.
    """
    room = [max_tokens] * num_bins
    rest = _size(items)
    chosen: list[int] = []  # the bins of the items placed so far
    choices = [_open_bins(room, items[0][0], items[-1][0], rest)]  # those still to be tried
    for _ in range(len(items) + _SEARCH_EFFORT // (4 + num_bins)):
        if choices[-1]:
            chosen.append(choices[-1].pop())
            count = items[len(chosen) - 1][0]
            room[chosen[-1]] -= count
            rest -= count
            if len(chosen) == len(items):
                break
            choices.append(_open_bins(room, items[len(chosen)][0], items[-1][0], rest))
        else:
            choices.pop()
            if not chosen:
                return None
            count = items[len(chosen) - 1][0]
            room[chosen.pop()] += count
            rest += count
    else:
        return None
    bins = [[_NOTHING] for _ in range(num_bins)]
    for item, index in zip(items, chosen, strict=True):
        insort(bins[index], item)
    return bins


def _open_bins(room: list[int], count: int, smallest: int, rest: int) -> list[int]:
    """Bins with room for `count` tokens, the tightest last; of equal ones only one.

    None at all where the room that the smallest item can still use doesn't hold the `rest`.
    """
    if sum(free for free in room if free >= smallest) < rest:
        return []
    by_room = {free: index for index, free in enumerate(room) if free >= count}
    return [by_room[free] for free in sorted(by_room, reverse=True)]
