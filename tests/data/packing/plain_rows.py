"""Rows laid out token by token: plain twins of `collate_packed` and `collate_padded`."""

from __future__ import annotations

from itertools import accumulate


def plain_packed(sequences, share, group_sizes, counts, scored_prompts):
    """The fields of `collate_packed`, as nested lists."""
    row, uses, places = [], [], []  # places: of each sequence, those of its tokens in the row
    if not share:
        group_sizes = [1] * len(sequences)
    elif group_sizes is None:
        group_sizes = [2] * (len(sequences) // 2)
    ends = list(accumulate(group_sizes))
    for end, size in zip(ends, group_sizes, strict=True):
        group = range(end - size, end)
        ids = [[*prompt, *answer] for prompt, answer in (sequences[index] for index in group)]
        prefix = 0
        while all(prefix < len(each) and each[prefix] == ids[0][prefix] for each in ids):
            prefix += 1
        start = len(row)
        row += ids[0][:prefix]
        uses += [sum(counts[index] for index in group)] * prefix
        for index, each in zip(group, ids, strict=True):
            tail = each[prefix:]
            places.append([*range(start, start + prefix), *range(len(row), len(row) + len(tail))])
            row += tail
            uses += [counts[index]] * len(tail)
    return {"input_ids": [row or [0]], "uses": [uses or [1]]} | _scored(
        sequences, places, scored_prompts
    )


def plain_padded(sequences, pad_token_id, counts, scored_prompts):
    """The fields of `collate_padded`, as nested lists."""
    whole = [[*prompt, *answer] for prompt, answer in sequences]
    width = max(map(len, whole), default=1)
    fill = [width - len(each) for each in whole]
    rows = [each + [pad_token_id] * more for each, more in zip(whole, fill, strict=True)]
    uses = [
        [count] * len(each) + [0] * more
        for each, more, count in zip(whole, fill, counts, strict=True)
    ]
    places = [range(index * width, (index + 1) * width) for index in range(len(whole))]
    return {"input_ids": rows or [[pad_token_id]], "uses": uses or [[1]]} | _scored(
        sequences, places, scored_prompts
    )


def _scored(sequences, places, scored_prompts):
    """The places that predict the answers, and then those that predict the scored prompts."""
    positions, labels, bounds = [], [], [0]

    def add(ids, start, end, at):
        for index in range(start, end):
            positions.append(at[index - 1])
            labels.append(ids[index])
        bounds.append(len(labels))

    for (prompt, answer), at in zip(sequences, places, strict=True):
        add([*prompt, *answer], len(prompt), len(prompt) + len(answer), at)
    for index in scored_prompts:
        prompt = sequences[index][0]
        if len(prompt) > 1:
            add(prompt, 1, len(prompt), places[index])
    return {"scored_positions": positions, "labels": labels, "bounds": bounds}
