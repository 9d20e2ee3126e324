"""Holds out pairs for evaluation by their prompts, so that no prompt is in both parts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import datasets
import numpy as np
import xxhash

from dpofast.columns import ID_COLUMNS
from dpofast.data.reading.messages import content_text, decode_messages
from dpofast.data.reading.mixture import (
    Sources,
    check_shares,
    in_normal_form,
    sources_of,
    take_shares,
    taken_of,
    what_counts,
)
from dpofast.data.reading.records import BATCH_ROWS
from dpofast.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


def hold_out(
    dataset: Any,
    eval_split: float,
    *,
    seed: int = 42,
    shares: Mapping[str, float] | None = None,
    name: str = "dataset",
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split pairs into a part to train on and a part to evaluate on, with no prompt in both.

    Two pairs have the same prompt if the texts of its messages are the same, white space aside, or
    if their prompt_ids are equal. Roles, tools and other fields don't count, as a template may
    leave them out. All pairs of a prompt go to the same part, so a row with many answers stays
    whole. Which part that is depends on a hash of the prompt and the seed, and on where the wanted
    size draws the line in the order of these hashes, but not on the order of the rows.

    Each dataset of a mixture is split by itself. A prompt that occurs in several goes to the part
    that the first of them decides. Rows that were left out when they were read stay with the
    training pairs, so that they are reported.

    Args:
        dataset: pairs in any form that `load_preferences` reads, unpaired rows or a mixture.
        eval_split: part of the pairs to hold out, above 0 and below 1; or, as an int, their number.
            It is met as nearly as whole prompts allow: the difference is at most half the number of
            pairs of the smallest prompt that isn't held out, unless a part would have no prompt.
        seed: another seed gives another split.
        shares: name -> share of each dataset of a mixture, which both parts will have, as in
            `mix_preferences`.
        name: name of the dataset, used in errors and the log.

    Returns:
        The pairs to train on and the pairs to evaluate on, in the normal form and in their order.

    Raises:
        DataError: fewer than two prompts, so nothing can be held out; or a share leaves a dataset
            without a row in one of the parts.
        ConfigError: eval_split can't be used.
    """
    check_eval_split(eval_split)
    dataset = in_normal_form(dataset, name)
    sources = sources_of(dataset, name)
    if shares is not None:
        check_shares(shares, sources.names)
    sizes = sources.sizes()
    counted = what_counts(dataset)
    fraction = _fraction(eval_split, sizes, shares, name, counted)
    prompts = np.array(list(_prompt_hashes(dataset, seed)), dtype=object)
    held = _held(sources, prompts, fraction)
    is_held = np.array([held.get(prompt, False) for prompt in prompts], dtype=bool)
    if len(set(held.values())) < 2:
        raise DataError(
            f"{name}: no {counted} can be held out, because all {counted} of a dataset have the "
            f"same prompt; give a dataset of held-out {counted} instead (eval_dataset, or "
            "eval_dataset_name on the command line and in YAML)"
        )
    logger.info(
        "%s: %s of %s %s held out, with %s of %s prompts",
        *(name, f"{sources.counts[is_held].sum():,}", f"{sum(sizes.values()):,}", counted),
        *(f"{sum(held.values()):,}", f"{len(held):,}"),
    )
    training = dataset.select(np.flatnonzero(~is_held))
    held_out = dataset.select(np.flatnonzero(is_held))
    if shares is not None:
        count = int(eval_split) if eval_split >= 1 else None
        training = take_shares(training, shares, seed, name=f"training {counted}")
        held_out = take_shares(held_out, shares, seed, name=f"held-out {counted}", at_most=count)
    return training, held_out


def check_eval_split(eval_split: Any) -> None:
    """Raise ConfigError unless this is a float between 0 and 1, or an int of at least 1."""
    is_count = isinstance(eval_split, int) and not isinstance(eval_split, bool) and eval_split >= 1
    if not is_count and not (isinstance(eval_split, float) and 0 < eval_split < 1):
        raise ConfigError(
            f"got {eval_split!r} as eval_split, expected the part of the pairs to hold out, above "
            "0 and below 1, or their number, a whole number of at least 1."
        )


def _held(sources: Sources, prompts: np.ndarray, fraction: Fraction) -> dict[int, bool]:
    """Hash of a prompt -> whether it is held out.

    Args:
        sources: the datasets of a mixture, or a single one.
        prompts: hash of each row's prompt, [n].
        fraction: part of the pairs to hold out of each dataset.
    """
    held: dict[int, bool] = {}
    for number in sources.names.values():
        is_own = sources.numbers == number
        pairs_of = Counter[int]()
        for prompt, count in zip(prompts[is_own], sources.counts[is_own], strict=True):
            pairs_of[prompt] += int(count)
        _decide(pairs_of, fraction, held)
    return held


def _fraction(
    eval_split: float,
    sizes: Mapping[str, int],
    shares: Mapping[str, float] | None,
    name: str,
    counted: str,
) -> Fraction:
    """The part to hold out of each dataset."""
    if eval_split < 1:
        return Fraction(str(eval_split))
    used = sizes if shares is None else taken_of(sizes, shares, name)
    total = sum(used.values())
    if eval_split >= total:
        raise DataError(
            f"{name}: eval_split is {eval_split:,}, but there are only {total:,} {counted}, and at "
            "least one has to be left to train on; hold out fewer"
        )
    return Fraction(int(eval_split), total)


def _prompt_hashes(dataset: datasets.Dataset, seed: int) -> Iterator[int | None]:
    """A 128-bit hash of each row's prompt and of the seed; None for a row without a pair."""
    is_tokenised = ID_COLUMNS[0] in dataset.column_names
    column = ID_COLUMNS[0] if is_tokenised else "prompt"
    view = dataset.select_columns([column]).with_format(None)
    for batch in view.iter(batch_size=BATCH_ROWS):
        for prompt in batch[column]:
            if prompt is None:
                yield None
                continue
            if is_tokenised:
                content = np.array(prompt, dtype="<i4").tobytes()
            else:
                content = _prompt_text(prompt).encode()
            yield xxhash.xxh3_128_intdigest(content, seed=seed % 2**64)


def _prompt_text(prompt: str | list[str]) -> str:
    """What makes a prompt the same for any template: its texts, without their white space."""
    if isinstance(prompt, str):
        texts = [prompt]
    else:
        texts = [content_text(message.get("content")) for message in decode_messages(prompt)]
    return "\0".join("".join(text.split()) for text in texts)


def _decide(pairs_of: Mapping[int, int], fraction: Fraction, held: dict[int, bool]) -> None:
    """Decide for each prompt of one dataset whether it is held out.

    Args:
        pairs_of: hash of a prompt -> number of its pairs.
        fraction: part of the pairs to hold out.
        held: hash of a prompt -> whether it is held out; decisions are added, none is changed.
    """
    total = sum(pairs_of.values())
    wanted = min(max(int(fraction * total + Fraction(1, 2)), 1), total - 1)
    # How many pairs are still to be held out.
    missing = wanted - sum(count for prompt, count in pairs_of.items() if held.get(prompt))
    any_held = any(held.get(prompt) for prompt in pairs_of)
    any_kept = any(held.get(prompt) is False for prompt in pairs_of)
    rest = []
    for prompt in sorted(prompt for prompt in pairs_of if prompt not in held):
        held[prompt] = pairs_of[prompt] <= missing
        if held[prompt]:
            missing -= pairs_of[prompt]
            any_held = True
        else:
            rest.append(prompt)
    if not rest or (len(rest) == 1 and not any_kept):
        return
    # Each remaining prompt has more pairs than are missing. One more may still be nearer.
    smallest = min(rest, key=lambda prompt: pairs_of[prompt])
    if pairs_of[smallest] < 2 * missing or not any_held:
        held[smallest] = True
