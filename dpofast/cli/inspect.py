"""`dpofast inspect`: shows one row of the data, or the packed rows of one optimizer step."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.text import Text

from dpofast.cli.given import COMMAND_LINE, GivenOption, split_own_options
from dpofast.cli.inputs import load_policy_skeleton, load_tokenizer_for
from dpofast.cli.option_types import checked_value
from dpofast.cli.run_data import load_all_rows, load_training_data
from dpofast.cli.run_options import RunOptions, read_options
from dpofast.cli.terminal import print_rich
from dpofast.columns import LABEL_COLUMN
from dpofast.counted import counted
from dpofast.errors import ConfigError

if TYPE_CHECKING:
    from dpofast.data.packing.collate import Layout
    from dpofast.data.packing.plan import PlannedStep

OWN_OPTIONS = ("row", "step", "rank")


def show(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Print the training pair that --row names, or the packed rows that a rank runs in --step."""
    own, others = split_own_options(overrides, OWN_OPTIONS)
    options = read_options(parsed.config, others, OWN_OPTIONS)
    options.require("dataset_name")
    if "step" in own and "row" in own:
        raise ConfigError("--row shows a pair and --step a whole step: give one of them.")
    if "step" in own:
        rank = _rank(own.get("rank"), options.config)
        _show_step(options, _number("step", own["step"]), rank)
    elif "rank" in own:
        raise ConfigError("--rank says whose part of a step is shown: give --step, too.")
    else:
        _show_pair(options, _number("row", own["row"]) if "row" in own else 0)


def _show_pair(options: RunOptions, row: int) -> None:
    from dpofast.inspect.pair import render_untokenised_pair

    if options.script.tokenizer_name_or_path is None:
        options.require("model_name_or_path")
    tokenizer, limits = load_tokenizer_for(options), options.config.length_limits()
    pairs = load_all_rows(options, row)
    rows = pairs["row"][:]
    # A row with several rejected answers has several pairs, and each dataset has its own row N.
    shown = [index for index, number in enumerate(rows) if number == row]
    if not shown:
        raise ConfigError(f"--row: got {row}, but the data's rows are 0 to {max(rows)}.")
    if LABEL_COLUMN in pairs.column_names:
        print_rich(Text(_label_line(pairs[LABEL_COLUMN][:])))
    found = [pairs[index] for index in shown]
    # If all are left out, rendering the first one raises the reason.
    for pair in [pair for pair in found if not pair.get("left_out")] or found:
        if "source" in pair:
            print_rich(Text(pair["source"], style="bold"))
        print_rich(render_untokenised_pair(pair, tokenizer, limits=limits))
    lost = Counter(pair["left_out"] for pair in found if pair.get("left_out"))
    for reason, count in lost.items():
        print_rich(Text(f"left out of training, {counted(count, 'more pair')}: {reason}"))


def _label_line(labels: list[bool | None]) -> str:
    left_out = labels.count(None)
    rest = f", {left_out} left out" if left_out else ""
    return (
        f"{len(labels)} unpaired rows: {labels.count(True)} desirable, {labels.count(False)} "
        f"undesirable{rest}"
    )


def _show_step(options: RunOptions, step: int, rank: tuple[int, int]) -> None:
    from dpofast.model.packable import attention_limits
    from dpofast.options.named_loss import is_unpaired
    from dpofast.train.data.dataset import PairPreparer
    from dpofast.train.data.sampler import planned_steps, train_sampler
    from dpofast.train.data.stream import RunStream
    from dpofast.train.data.training_set import prepare_training_set
    from dpofast.train.steps.loaders import max_row_tokens

    config = options.config
    options.require("model_name_or_path")
    if is_unpaired(config):
        raise ConfigError(
            f"{options.source}: --step shows steps of pairs, and {config.loss_type[0]} has none; "
            "inspect single rows with --row."
        )
    model = load_policy_skeleton(options)
    layout = _packed_layout(config.layout, model)
    tokenizer = load_tokenizer_for(options)
    data = PairPreparer(config, tokenizer)
    train_set = prepare_training_set(data, load_training_data(options), rank[1])
    if isinstance(train_set, RunStream):
        _refuse_beyond("step", step, train_set.num_steps, "the run's steps")
        window = train_set.window(step)
        pairs, start, epoch = window.dataset, window.first_step, window.taken.start.epoch
    else:
        pairs, start, epoch = train_set, 0, 0
    pairs.measure_lengths(layout, max_row_tokens(config, _refuse_to_measure))
    sampler = train_sampler(
        *(config, len(pairs), pairs.token_limit, rank),
        in_order=pairs.is_window,
        prompts=pairs.prompts,
    )
    if not pairs.is_window:
        _refuse_beyond("step", step, planned_steps(config, sampler), "the run's steps")
        epoch = step // len(sampler)
        sampler.set_epoch(epoch)
        start = epoch * len(sampler)
    planned = sampler.step(step - start)
    figures = sampler.figures()
    assert figures is not None  # rows are packed
    print_rich(Text(f"Layout: {layout.name}; {sampler.describe(figures)}."))
    _print_headline(planned, f"step {step} (epoch {epoch}), rank {rank[0]} of {rank[1]}")
    _print_packed_rows(planned, pairs, layout, tokenizer, attention_limits(model))


def _print_headline(planned: PlannedStep, place: str) -> None:
    rows = planned.micro_batches
    count = f"{sum(map(len, rows))} of the step's {planned.num_pairs} pairs"
    print_rich(Text(f"{place}: {count} in {counted(len(rows), 'row')}", style="bold"))
    print_rich(Text("scored from: the places whose hidden states predict the answer", style="dim"))


def _print_packed_rows(
    planned: PlannedStep,
    dataset: Any,
    layout: Layout,
    tokenizer: Any,
    limits: tuple[int | None, int | None],
) -> None:
    """Lay out each micro-batch of a step as training would, and print it.

    Args:
        planned: the step.
        dataset: the run's pairs.
        layout: layout of the rows.
        tokenizer: turns ids into text.
        limits: the window and the chunk of the model's layers, as `attention_limits` gives them.
    """
    import numpy as np

    from dpofast.data.packing.likelihood import NO_LIKELIHOOD
    from dpofast.inspect.packed import render_packed

    # Rows depend neither on the reference's log-probs, so nothing is scored, nor on the loss.
    dataset.ref_logps = np.zeros((len(dataset), 2))
    dataset.likelihood = NO_LIKELIHOOD
    step = dataset.step_dataset(layout).__getitems__(planned)
    window, chunk = limits
    for number, (row, batch) in enumerate(zip(step.indices, step.micro_batches, strict=True)):
        print_rich(Text(f"\nrow {number} of {len(step.indices)}", style="bold reverse"))
        examples = [dataset.pairs[pair] for pair in row]
        print_rich(render_packed(batch, examples, tokenizer, window=window, chunk=chunk))


def _refuse_to_measure() -> int:
    """Raise ConfigError: only training finds out what fits a GPU's free memory."""
    raise ConfigError(
        "--step: on a GPU rows are as long as its memory allows, which only training finds "
        "out; give --max_tokens_per_microbatch, too (the log of a run says what it took)."
    )


def _packed_layout(wanted: str, model: Any) -> Layout:
    """The layout that training will use.

    Raises:
        ConfigError: it is padded, or a packed layout is asked for that would be wrong.
        ModelError: training would refuse the model with this layout.
    """
    from dpofast.model.packable import choose_layout, why_not_packed

    layout = choose_layout(wanted, model, pad_token_id=0)  # unused, as packed rows have no padding
    if layout.is_packed:
        return layout
    reason = "it was asked for" if wanted == "padded" else why_not_packed(model)
    raise ConfigError(
        f"--step: the run's layout is padded, as {reason}, so each sequence has a row of its "
        "own and no row is packed; --row N shows a pair."
    )


def _number(name: str, given: GivenOption) -> int:
    return checked_value(f"--{name}", given.value, int, COMMAND_LINE)


def _rank(given: GivenOption | None, config: Any) -> tuple[int, int]:
    """Read "2/8" as rank 2 of 8; by default, take the rank of this process."""
    if given is None:
        return config.process_index, config.world_size
    found = re.fullmatch(r"(\d+)/(\d+)", str(given.value))
    if found is None or not int(found[1]) < int(found[2]):
        raise ConfigError(
            f"--rank: got {given.value!r}, expected a rank, counted from 0, and how many there "
            "are, such as 0/8."
        )
    return int(found[1]), int(found[2])


def _refuse_beyond(name: str, value: int, count: int, what: str) -> None:
    if not 0 <= value < count:
        raise ConfigError(f"--{name}: got {value}, but {what} are 0 to {count - 1}.")
