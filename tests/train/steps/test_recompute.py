"""Layers that recompute their activations where gradient_checkpointing is auto."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from dpofast import DPOConfig
from dpofast.data.packing.collate import Layout
from dpofast.errors import ConfigError
from dpofast.model.parts import body_of, num_layers
from dpofast.train.checkpoint.run_state import load_run_state
from dpofast.train.steps import memory, recompute
from dpofast.train.steps.memory import (
    USED_SHARE,
    BodyBytes,
    body_bytes,
    bytes_for_rows,
    tokens_that_fit,
)
from dpofast.train.steps.recompute import checkpoint_layers, layers_to_checkpoint, wanted_tokens
from tests.families import FAMILIES, tiny_model
from tests.support import history, make_trainer, tiny_llama, token_pairs, train

LAYERS = 6
AUTO = {"gradient_checkpointing": "auto"}


def llama() -> Any:
    return tiny_llama(num_hidden_layers=LAYERS)


def flags(model: Any) -> list[bool]:
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    return [layer.gradient_checkpointing for layer in layers]


def pretend(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    monkeypatch.setattr(recompute, "free_bytes", lambda _: free)


def memory_for(trainer: Any, layers: int, row_tokens: int = 2048) -> float:
    """Free bytes with which just so many layers must recompute."""
    body = body_bytes(trainer.model, trainer.layout, contextlib.nullcontext)
    wanted = wanted_tokens(trainer.train_set(), trainer.layout, trainer.args, row_tokens)
    needed = wanted * body.of_row(layers).per_token / USED_SHARE + body.fixed
    return needed - bytes_for_rows(trainer.model, trainer.args, 0) + 1


# By hand: 10 layers of 100 bytes a token, 4 for a checkpointed one, and 6 behind them.
BODY = BodyBytes([100.0] * 10, 4, 6, 0.0)


@pytest.mark.parametrize(
    ("free", "layers"),
    [
        (1006, 0),
        (1005, 2),  # one layer wouldn't help: its inside is computed again
        (914, 2),
        (913, 3),
        (146, 10),
        (0, 10),
    ],
)
def test_the_fewest_layers_with_which_a_row_fits(free: int, layers: int) -> None:
    assert layers_to_checkpoint(BODY, 7 * free, 7) == layers
    expected = 0 if layers == 0 else 10
    assert layers_to_checkpoint(BODY, 7 * free, 7, is_divisible=False) == expected


def test_layers_of_different_sizes_count_one_by_one() -> None:
    uneven = BodyBytes([10.0, 10.0, 100.0, 100.0], 4, 6, 0.0)
    assert [uneven.of_row(count).per_token for count in range(5)] == [226, 320, 314, 218, 122]
    assert layers_to_checkpoint(uneven, 219, 1) == 3


def test_more_memory_never_takes_more_layers() -> None:
    chosen = [layers_to_checkpoint(BODY, free, 3) for free in range(0, 4000, 7)]
    assert chosen == sorted(chosen, reverse=True)
    assert set(chosen) == {0, *range(2, 11)}


@pytest.mark.parametrize("count", [0, 1, 4, LAYERS])
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_first_layers_recompute(count: int, reentrant: bool) -> None:
    model = llama()
    checkpoint_layers(model, LAYERS, {})
    checkpoint_layers(model, count, {"use_reentrant": reentrant})
    assert flags(model) == [True] * count + [False] * (LAYERS - count)
    function = model.model.layers[0]._gradient_checkpointing_func
    assert not count or function.keywords == {"use_reentrant": reentrant}


def test_an_adapters_layers_recompute() -> None:
    peft = pytest.importorskip("peft", reason="needs the extra `peft`")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    checkpoint_layers(model, 2, {})
    assert flags(model) == [True] * 2 + [False] * (LAYERS - 2)


def test_layers_of_text_recompute_beside_a_tower_for_pictures() -> None:
    model = tiny_model("gemma3 with pictures")
    checkpoint_layers(model, 2, {})
    assert flags(body_of(model)) == [True, True, False]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "numbers"), [("shared", (LAYERS, 4, 2, 0)), ("padded", (3,))])
def test_any_memory_gives_the_same_numbers(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, layout: str, numbers: tuple[int, ...]
) -> None:
    options = {"layout": layout, "max_steps": 3}
    expected = train(make_trainer(tmp_path / "none", llama(), options=options))
    chosen = []
    for layers in numbers:
        made = make_trainer(tmp_path / str(layers), llama(), options={**options, **AUTO})
        pretend(monkeypatch, memory_for(made, layers))
        assert train(made) == expected
        assert flags(made.model) == [True] * layers + [False] * (LAYERS - layers)
        chosen.append(made.recomputation.layers)
    assert chosen == list(numbers)
    assert made.args.gradient_checkpointing == "auto", "the options are the user's again"


@pytest.mark.slow
def test_a_resumed_run_takes_the_stored_number(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**AUTO, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    expected = make_trainer(tmp_path, llama(), options=options)
    pretend(monkeypatch, memory_for(expected, 3))
    expected.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert load_run_state(checkpoint).recomputed_layers == 3

    resumed = make_trainer(tmp_path, llama(), options=options)
    pretend(monkeypatch, 0)
    resumed.train(str(checkpoint))
    assert flags(resumed.model) == [True] * 3 + [False] * (LAYERS - 3)
    assert history(resumed) == history(expected)

    other = make_trainer(tmp_path, llama(), options={**options, "gradient_checkpointing": True})
    other.train(str(checkpoint))
    assert all(flags(other.model)), "what the options say counts for more"


def test_on_a_cpu_auto_is_true(tmp_path: Any) -> None:
    made = make_trainer(tmp_path, llama(), options={**AUTO, "max_steps": 1})
    made.train()
    assert all(flags(made.model))
    assert DPOConfig(str(tmp_path), use_cpu=True).gradient_checkpointing == "auto"


@pytest.mark.slow
def test_a_row_is_as_long_as_the_chosen_layers_allow(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, layout = llama(), Layout("shared")
    made = DPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    body = body_bytes(model, layout, contextlib.nullcontext)
    for free in (2 * 10**7, 5 * 10**7, 9 * 10**7):
        total = free - bytes_for_rows(model, made, 0)
        layers = layers_to_checkpoint(body, USED_SHARE * free, recompute.BUSY_ROW)
        tokens = tokens_that_fit(model, layout, made, contextlib.nullcontext, total, layers)
        assert tokens >= recompute.BUSY_ROW or layers == LAYERS
        again = layers_to_checkpoint(body, USED_SHARE * free, tokens)
        assert again == layers, "the row that is chosen asks for the same layers"


@pytest.mark.slow
def test_the_measured_row_is_that_of_the_chosen_layers(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_trainer(tmp_path, llama(), options=AUTO)
    lengths = {}
    for layers in (LAYERS, 3):
        free = memory_for(made, layers, recompute.BUSY_ROW)
        pretend(monkeypatch, free)
        monkeypatch.setattr(memory, "free_device_bytes", lambda _, free=free: free)
        lengths[layers] = made.recomputation.row_tokens()
        made.recomputation.layers = None
        made.recomputation.settle(lengths[layers])
        assert made.recomputation.layers == layers
    assert set(lengths.values()) == {recompute.BUSY_ROW}


class TestWantedTokens:
    def test_rows_are_as_long_as_the_longest_pair(self, tmp_path: Any) -> None:
        made = make_trainer(tmp_path, options={"max_tokens_per_microbatch": 8})
        train_set, layout = made.train_set(), made.layout
        train_set.measure_lengths(layout, 8)
        longest = max(train_set.token_limit.lengths)
        assert wanted_tokens(train_set, layout, made.args, 8) == longest > 8
        assert wanted_tokens(train_set, layout, made.args, longest + 5) == longest + 5

    def test_without_pairs_the_limits_count(self, tmp_path: Any) -> None:
        made = DPOConfig(str(tmp_path), use_cpu=True, max_length=100, max_tokens_per_microbatch=50)
        made.per_device_train_batch_size = 3
        assert wanted_tokens(None, Layout("shared"), made, None) == 200
        assert wanted_tokens(None, Layout("shared"), made, 300) == 300
        assert wanted_tokens(None, Layout("padded"), made, None) == 600
        made.max_length = None
        assert wanted_tokens(None, Layout("shared"), made, None) == 50
        assert wanted_tokens(None, Layout("padded"), made, None) == 6 * recompute.BUSY_ROW


def test_layers_of_other_families_can_be_checkpointed_one_by_one() -> None:
    for family in ("gemma2", "mixtral", "qwen3", "opt"):
        assert recompute.single_layers(tiny_model(family)), family


@pytest.mark.parametrize("value", ["AUTO", "True", "false", "often", 3])
def test_words_for_the_option(tmp_path: Any, value: Any) -> None:
    if value in ("often", 3):
        with pytest.raises(ConfigError, match="expected auto, true or false"):
            DPOConfig(str(tmp_path), use_cpu=True, gradient_checkpointing=value)
        return
    made = DPOConfig(str(tmp_path), use_cpu=True, gradient_checkpointing=value)
    assert made.gradient_checkpointing == {"AUTO": "auto", "True": True, "false": False}[value]


def test_every_n_layers_says_itself_which(tmp_path: Any) -> None:
    options = {**AUTO, "gradient_checkpointing_kwargs": {"every_n_layers": 2}, "max_steps": 1}
    made = make_trainer(tmp_path, llama(), token_pairs(10), options=options)
    made.train()
    assert made.recomputation.layers is None
    assert flags(made.model) == [True, False] * 3


def test_nothing_recomputes_where_transformers_cannot_make_it(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_trainer(tmp_path, llama(), options=AUTO)
    pretend(monkeypatch, 0)
    made.model.supports_gradient_checkpointing = False
    made.recomputation.settle(2048)
    assert made.recomputation.layers == 0


def test_ranks_agree_on_the_most_that_any_needs(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_trainer(tmp_path, llama(), options=AUTO)
    monkeypatch.setattr(made.accelerator, "gather", lambda own: torch.cat([own, own - 4]))
    made.recomputation.settle(2048)
    assert made.recomputation.layers == LAYERS


@pytest.mark.parametrize(
    "family",
    ["blt", *(pytest.param(each, marks=pytest.mark.slow) for each in FAMILIES if each != "blt")],
)
def test_every_family_has_a_number_of_layers_and_their_bytes(family):
    """BLT's config has neither a number of layers nor a hidden size."""
    model = tiny_model(family)
    body = body_bytes(model, Layout("padded", 0), contextlib.nullcontext)
    # LongCat's config counts each of its layers twice, as it attends twice.
    assert body.num_layers == num_layers(model) // (2 if family == "longcat_flash" else 1) >= 1
    assert body.of_row(0).per_token > 0
