"""Packed rows against separate sequences: hidden states, loss and every gradient, in float64."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from dpofast.attention import packed_attention
from dpofast.checks import check_layout
from dpofast.data.layout import Layout
from dpofast.errors import ConfigError
from dpofast.head import PairLossTask, head_options
from dpofast.layouts import PACKABLE, attention_window, choose_layout, why_not_packed
from dpofast.model import body_of, causal_lm, load_skeleton, pair_step, run_batch
from dpofast_kernels import make_loss
from dpofast_kernels.attention import shared_attention
from tests.families import (
    DEAF_FAMILIES,
    FAMILIES,
    MIXING_FAMILIES,
    OTHER_PACKABLE_FAMILIES,
    PACKABLE_FAMILIES,
    UNPACKABLE_FAMILIES,
    VOCAB_SIZE,
    tiny_model,
)
from tests.support import float64_throughout

BETA = 0.7
# tokens of prompt, of what both answers begin with, and of the rest of chosen and rejected
PAIRS = ((13, 0, 7, 9), (5, 3, 11, 1), (20, 0, 3, 17), (1, 2, 4, 6), (4, 5, 0, 3), (6, 4, 2, 0))

# transformers refuses
NO_SDPA = {
    "bloom",
    "codegen",
    "gemma2",
    "gpt_oss",
    "gptj",
    "mamba",
    "mimo_v2_flash",
    "mpt",
    "vaultgemma",
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sequences() -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids), chosen and rejected in turn."""
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(1, VOCAB_SIZE, (count,), generator=generator).tolist()

    found = []
    for prompt, common, chosen, rejected in PAIRS:
        prompt_ids, common_ids = ids(prompt), ids(common)
        found += [(prompt_ids, common_ids + ids(chosen)), (prompt_ids, common_ids + ids(rejected))]
    return found


REF_LOGPS = [-3.0 * len(answer) - 0.05 * index for index, (_, answer) in enumerate(sequences())]


class Outcome:
    """Loss, hidden states that predict the answers, and the gradients of all parameters."""

    def __init__(self, model: Any, loss: Tensor, hidden_states: Tensor) -> None:
        model.zero_grad()
        loss.backward()
        self.loss, self.hidden_states = loss.detach(), hidden_states.detach()
        self.gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in model.named_parameters()
        }


def separate(model: Any) -> Outcome:
    """Every sequence through the stock model alone, as a textbook writes DPO."""
    logratios, hidden_states = [], []
    for (prompt, answer), ref_logp in zip(sequences(), REF_LOGPS, strict=True):
        output = model(
            torch.tensor([[*prompt, *answer]]), use_cache=False, output_hidden_states=True
        )
        logps = output.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logratios.append(logps.gather(-1, torch.tensor(answer)[:, None]).sum() - ref_logp)
        states = body_of(causal_lm(model))(torch.tensor([[*prompt, *answer]]), use_cache=False)[0]
        hidden_states.append(states[0, len(prompt) - 1 : -1])
    margins = BETA * (torch.stack(logratios[0::2]) - torch.stack(logratios[1::2]))
    return Outcome(model, -F.logsigmoid(margins).sum(), torch.cat(hidden_states))


def laid_out(model: Any, layout: Layout) -> Outcome:
    """All pairs in one micro-batch, by the way that the trainer takes."""
    lm = causal_lm(model)
    batch = layout.collate(sequences(), REF_LOGPS)
    task = PairLossTask(
        batch.labels,
        batch.bounds,
        batch.ref_logps,
        make_loss("sigmoid", beta=BETA),
        head_options(lm.config),
    )
    scored = []

    def spy(hidden_states: Tensor, *weights: Any) -> Any:
        scored.append(hidden_states)
        return task(hidden_states, *weights)

    with packed_attention(lm.config, batch.shared_layout):
        with pair_step(model):
            loss, *_ = run_batch(model, batch, spy)
        return Outcome(model, loss, scored[0])


def compare(model: Any, layout: Layout) -> None:
    with float64_throughout():
        expected = separate(model)
        found = laid_out(model, layout)
    scale = expected.hidden_states.abs().max()
    assert (found.hidden_states - expected.hidden_states).abs().max() <= 1e-12 * scale
    assert abs(found.loss - expected.loss) <= 1e-10 * expected.loss
    largest = max(gradient.abs().max() for gradient in expected.gradients.values())
    assert largest > 1e-3
    for name, gradient in expected.gradients.items():
        assert (found.gradients[name] - gradient).abs().max() <= 1e-10 * largest, name


@pytest.mark.parametrize("name", ["shared", "unshared", "padded"])
@pytest.mark.parametrize("family", PACKABLE_FAMILIES)
def test_every_layout_equals_separate_sequences(family, name):
    compare(tiny_model(family).double(), Layout(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shared", "unshared"])
@pytest.mark.parametrize("family", OTHER_PACKABLE_FAMILIES)
def test_all_model_types_that_are_packed_equal_separate_sequences(family, name):
    class_name, _ = OTHER_PACKABLE_FAMILIES[family]
    if not hasattr(transformers, class_name):
        pytest.skip(f"transformers {transformers.__version__} has no {class_name}")
    model = tiny_model(family).double()
    assert choose_layout("auto", model, 0).name == "shared"
    compare(model, Layout(name))


def test_every_packable_model_type_is_compared():
    """Whoever adds one to the list adds a model to the tests, too."""
    families = {**PACKABLE_FAMILIES, **OTHER_PACKABLE_FAMILIES}
    classes = {getattr(transformers, name, None) for name, _ in families.values()} - {None}
    missing = {"internlm3"} if not hasattr(transformers, "InternLM3Config") else set()
    assert {each.model_type for each in classes} == PACKABLE - missing


@pytest.mark.parametrize("family", {**DEAF_FAMILIES, **MIXING_FAMILIES})
def test_the_reason_why_a_model_is_padded_is_named(family, caplog):
    caplog.set_level("INFO", logger="dpofast")
    assert choose_layout("auto", tiny_model(family), 0).name == "padded"
    (line,) = [record.message for record in caplog.records if "Layout: padded" in record.message]
    reason = {
        "llama4": "its layers of type chunked_attention",
        "lfm2": "its layers of type conv",
        "minimax": "its layers of type linear_attention",
        "nemotron": "its layers don't hand on to attention what it needs to know",
        "stablelm": "its layers don't hand on to attention what it needs to know",
    }.get(family, "its attention can't be replaced")
    assert reason in line


@pytest.mark.parametrize("family", UNPACKABLE_FAMILIES)
def test_what_cannot_be_packed_is_recognised_and_right_when_padded(family, caplog):
    model = tiny_model(family).double()
    caplog.set_level("INFO", logger="dpofast")
    layout = choose_layout("auto", model, pad_token_id=0)
    assert layout.name == "padded"
    assert [record for record in caplog.records if "Layout: padded" in record.message]
    with pytest.raises(ConfigError, match="layout: 'shared' would be wrong here, as"):
        choose_layout("shared", model, pad_token_id=0)
    compare(model, layout)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - NO_SDPA))
def test_padded_rows_are_right_under_sdpa(family):
    """Without a mask it takes the kernel that knows only of causal rows."""
    compare(tiny_model(family, "sdpa").double(), Layout("padded"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_row_with_nothing_scored_moves_nothing(family):
    """What a rank without pairs runs: one token."""
    model = tiny_model(family)
    batch = Layout("padded").collate([], [])
    task = PairLossTask(
        batch.labels,
        batch.bounds,
        batch.ref_logps,
        make_loss("sigmoid", beta=BETA),
        head_options(model.config),
    )
    with pair_step(model):
        loss, *_ = run_batch(model, batch, task)
    loss.backward()
    assert batch.input_ids.shape == (1, 1)
    assert loss == 0.0
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all((gradient == 0.0).all() for gradient in gradients)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_gradient_checkpointing(family, reentrant):
    model = tiny_model(family).double()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    compare(model, Layout("shared"))


def test_every_packable_family_is_laid_out_shared():
    for family in PACKABLE_FAMILIES:
        model = tiny_model(family)
        assert choose_layout("auto", model, 0) == Layout("shared", 0), family
        check_layout(Layout("shared", 0), model)
        check_layout(Layout("unshared", 0), model)


def test_dropout_takes_the_padded_layout():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.attention_dropout = 0.1
    assert why_not_packed(model) == "LlamaAttention has a dropout above 0"


@pytest.mark.parametrize(
    ("family", "window"),
    [("llama", None), ("qwen2", None), ("mistral with window", 6), ("gemma3", 6), ("gpt_oss", 6)],
)
def test_the_window_that_layers_look_through(family, window):
    """As what their attention is really called with."""
    model = tiny_model(family)
    assert attention_window(model) == window
    batch = Layout("shared").collate(sequences())
    with mock.patch("dpofast.attention.shared_attention", wraps=shared_attention) as spy:
        with packed_attention(model.config, batch.shared_layout), torch.no_grad():
            body_of(model)(
                batch.input_ids,
                position_ids=batch.position_ids,
                shared_layout=batch.shared_layout,
                use_cache=False,
            )
        seen = {call.args[4].window for call in spy.call_args_list}
    assert max(seen, key=lambda each: each or 0) == window


@pytest.mark.parametrize("family", [*PACKABLE_FAMILIES, *UNPACKABLE_FAMILIES])
def test_a_model_without_weights_takes_the_layout_of_the_whole(tmp_path, family):
    """And with dropouts above 0, those of the config included."""
    for index, rate in enumerate((0.0, 0.1)):
        model = tiny_model(family)
        for name in ("attention_dropout", "hidden_dropout", "dropout", "resid_pdrop"):
            if rate and hasattr(model.config, name):
                setattr(model.config, name, rate)
        model.config.save_pretrained(tmp_path / str(index))
        whole = type(model)(model.config)
        skeleton = load_skeleton(str(tmp_path / str(index)), dtype="bfloat16")
        assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
        assert type(skeleton) is type(whole)
        assert why_not_packed(skeleton) == why_not_packed(whole)
        assert (why_not_packed(whole) is None) == (family in PACKABLE_FAMILIES and not rate)
