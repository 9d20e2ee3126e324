"""Loads the pairs of a run: every command that reads them gets the same mixture and split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpofast.cli.run_options import RunOptions

NO_HELD_OUT_PAIRS = (
    "there are no held-out pairs; set eval_split, eval_dataset_name or dataset_test_split."
)


def load_run_data(options: RunOptions) -> tuple[Any, Any]:
    """Load the training pairs and the held-out pairs in the normal form.

    Returns:
        The training pairs, as `load_training_data` returns them; the held-out pairs, None if no
        option asks for any.

    Raises:
        DataError: the data can't be used; names the file and row.
    """
    if options.script.eval_split is not None:
        return _split(options)
    return load_training_data(options), load_held_out_data(options)


def load_training_data(options: RunOptions) -> Any:
    """Load the training pairs in the normal form; a PairStream for dataset_streaming.

    Raises:
        DataError: the data can't be used; names the file and row.
    """
    script = options.script
    if script.eval_split is not None:
        return _split(options)[0]
    if script.dataset_streaming:
        return _open_stream(options, script.dataset_names[0], script.dataset_train_split)
    return _load_sets(options, script.dataset_train_split, _shares(options))


def load_held_out_data(options: RunOptions) -> Any:
    """Load the held-out pairs in the normal form; None if no option asks for any.

    Raises:
        DataError: the data can't be used; names the file and row.
    """
    script = options.script
    if script.eval_split is not None:
        return _split(options)[1]
    if script.eval_dataset_name is not None:
        split = script.dataset_test_split or "train"
        return _load_pairs(options, script.eval_dataset_name, split)
    if script.dataset_test_split is not None:
        return _load_sets(options, script.dataset_test_split)
    return None


def load_all_rows(options: RunOptions, last_row: int) -> Any:
    """Load all rows of the training datasets, even those that are held out or not taken.

    The rows are pairs, or unpaired if the first dataset's columns say so.

    Args:
        options: options of the run.
        last_row: the last row that is needed, counted from 0. A stream is read up to it.

    Raises:
        DataError: the data can't be used; names the file and row.
    """
    from dpofast.data import data_kind, load_preferences, load_unpaired

    script = options.script
    first, split = script.dataset_names[0], script.dataset_train_split
    if script.dataset_streaming:
        source = _open_stream(options, first, split).source
        first = source if isinstance(source, str) else source.take(last_row + 1)
    kind = data_kind(
        first, columns=script.dataset_columns, split=split, config_name=script.dataset_config
    )
    load = load_unpaired if kind == "unpaired" else load_preferences
    if script.dataset_streaming:
        return _load_pairs(options, first, split, load)
    return _load_sets(options, split, load=load)


def _split(options: RunOptions) -> tuple[Any, Any]:
    """The training pairs and the held-out pairs of eval_split."""
    from dpofast.data import hold_out

    script = options.script
    assert script.eval_split is not None
    # The shares are taken of the two parts, so that they hold for both.
    return hold_out(
        _load_sets(options, script.dataset_train_split),
        script.eval_split,
        seed=options.config.seed,
        shares=_shares(options),
        name=" + ".join(script.dataset_names),
    )


def _shares(options: RunOptions) -> dict[str, float] | None:
    names, shares = options.script.dataset_names, options.script.dataset_shares
    # The share of a single dataset is the whole.
    return None if shares is None or len(names) == 1 else dict(zip(names, shares, strict=True))


def _load_sets(
    options: RunOptions,
    split: str,
    shares: dict[str, float] | None = None,
    load: Callable[..., Any] | None = None,
) -> Any:
    """One dataset, or a mixture of several; `load` reads each, by default `load_preferences`."""
    from dpofast.data import mix_preferences

    names = options.script.dataset_names
    sets = {name: _load_pairs(options, name, split, load) for name in names}
    given = options.script.dataset_weights
    weights = None if given is None else dict(zip(sets, given, strict=True))
    if len(sets) == 1 and weights is None:
        return next(iter(sets.values()))
    return mix_preferences(sets, shares, weights=weights, seed=options.config.seed)


def load_either(source: Any, **arguments: Any) -> Any:
    """Unpaired rows, or pairs, which the trainer splits after some of them are held out.

    Args:
        source: what holds the rows.
        arguments: further arguments of `load_unpaired` and `load_preferences`.
    """
    from dpofast.data import data_kind, load_preferences, load_unpaired

    names = ("columns", "split", "config_name")
    of_source: dict[str, Any] = {name: arguments[name] for name in names}
    is_unpaired = data_kind(source, **of_source) == "unpaired"
    return (load_unpaired if is_unpaired else load_preferences)(source, **arguments)


def _open_stream(options: RunOptions, name: str, split: str) -> Any:
    """Pairs whose rows are read later."""
    from dpofast.data import PairStream

    script = options.script
    return PairStream(
        name,
        columns=script.dataset_columns,
        roles=script.dataset_roles,
        split=split,
        config_name=script.dataset_config,
        answer_pairs=options.config.answer_pairs,
    )


def _load_pairs(
    options: RunOptions, source: Any, split: str, load: Callable[..., Any] | None = None
) -> Any:
    from dpofast.data import load_preferences
    from dpofast.options.named_loss import is_unpaired

    name = None
    if isinstance(source, str) and options.script.dataset_streaming:
        # Without this, `datasets` would download all splits to give one of them.
        name, source = source, _open_stream(options, source, split).source
    if load is None:
        load = load_either if is_unpaired(options.config) else load_preferences
    of_pairs = {"answer_pairs": options.config.answer_pairs} if load is load_preferences else {}
    return load(
        source,
        name=name,
        columns=options.script.dataset_columns,
        roles=options.script.dataset_roles,
        split=split,
        strict=options.config.strict,
        skip_bad_rows=options.config.skip_bad_rows,
        config_name=options.script.dataset_config,
        **of_pairs,
    )
