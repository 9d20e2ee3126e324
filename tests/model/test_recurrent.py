"""Layers with a state or a convolution, in packed rows: exact, or refused before the first step."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch

from dpofast.data.packing.collate import Layout
from dpofast.errors import ConfigError, ModelError
from dpofast.model import recurrent
from dpofast.model.checks import check_layout, check_model
from dpofast.model.forward import micro_batch, run_body
from dpofast.model.load import load_skeleton
from dpofast.model.packable import choose_layout, why_not_packed
from dpofast.model.parts import body_of
from dpofast.model.recurrent_families import RECURRENT_FAMILIES as NAMES
from tests.exactness import SHORT, Outcome, assert_alike, case_of, compare
from tests.families import tiny_model
from tests.family_sizes import VOCAB_SIZE
from tests.recurrent_families import RECURRENT_FAMILIES
from tests.support import float64_throughout, make_trainer, token_pairs

# One family of each kind; all others are compared in `make test-slow`.
KINDS = ("granitemoehybrid", "lfm2", "qwen3_5")


def families(*quick):
    """All families, as parameters of a test that is slow for those that aren't named."""
    return [
        pytest.param(family, marks=() if family in quick else pytest.mark.slow)
        for family in RECURRENT_FAMILIES
    ]


LAYOUTS = ["shared", pytest.param("unshared", marks=pytest.mark.slow)]
SHARED = Layout("shared")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def home_of(model):
    """The family's names, and the Python module of its mixers."""
    family = NAMES[model.config.model_type]
    return family, sys.modules[type(model).__module__]


# Groups of sequences with one prompt: tokens of the prompt, tokens with which all answers begin,
# and further tokens of each answer. Two answers and more, prefixes of one token and of fewer than
# a convolution is wide, and tails of 0 tokens and of 1.
GROUPS = (
    *((20, 0, (7, 4, 9)), (1, 0, (1, 3)), (1, 0, (5, 1, 2)), (2, 0, (3, 6))),
    *((5, 3, (0, 1, 4)), (6, 2, (0, 5)), (9, 4, (0,)), (1, 1, (0, 0, 2))),
)


def grouped_sequences():
    """Sequences of the groups; answers differ from the token after their common start on."""
    generator = torch.Generator().manual_seed(2)

    def ids(count):
        return torch.randint(4, VOCAB_SIZE, (count,), generator=generator).tolist()

    found = []
    for prompt, common, others in GROUPS:
        prompt_ids, common_ids = ids(prompt), ids(common)
        for number, more in enumerate(others):
            answer = [*common_ids, *[1 + number][:more], *ids(more - 1 if more else 0)]
            found.append((prompt_ids, answer))
    return found


def compare_groups(model, layout):
    """Compares groups of several answers with separate sequences, by a sum that has no head."""
    sequences = grouped_sequences()
    batch = layout.collate(sequences, group_sizes=[len(others) for *_, others in GROUPS])
    if layout.shares:
        expected_groups = tuple((prompt + common, others) for prompt, common, others in GROUPS)
        assert batch.shared_layout.groups == expected_groups
    factors = torch.randn(len(batch.labels), 32, dtype=torch.float64)

    def outcome(states):
        model.zero_grad()
        loss = (states * factors).square().sum()
        loss.backward()
        return Outcome(model, loss, states)

    with float64_throughout():
        alone = []
        for prompt, answer in sequences:
            states = body_of(model)(torch.tensor([[*prompt, *answer]]), use_cache=False)[0]
            alone.append(states[0, len(prompt) - 1 : -1])
        expected = outcome(torch.cat(alone))
        with micro_batch(model, batch):
            packed = run_body(model, batch).flatten(0, 1)[batch.scored_positions]
            found = outcome(packed)
    assert_alike(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", families(*KINDS))
def test_packed_rows_equal_separate_sequences(family, layout):
    model = tiny_model(family).double()
    assert choose_layout("auto", model, 0).name == "shared"
    check_layout(Layout(layout), model)
    compare(model, SHORT, Layout(layout))


def long_case():
    """Prefixes and answers that are longer than the chunks in which recurrences run."""
    generator = torch.Generator().manual_seed(3)
    sequences = []
    for prompt, chosen, rejected in ((150, 70, 131), (64, 64, 1), (1, 129, 66)):
        prompt_ids, *answers = (
            torch.randint(1, VOCAB_SIZE, (count,), generator=generator).tolist()
            for count in (prompt, chosen, rejected)
        )
        sequences += [(prompt_ids, answer) for answer in answers]
    return case_of(sequences, beta=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("family", RECURRENT_FAMILIES)
def test_long_sequences_and_two_threads(family):
    torch.set_num_threads(2)
    compare(tiny_model(family).double(), long_case(), SHARED)


@pytest.mark.slow
@pytest.mark.parametrize("family", RECURRENT_FAMILIES)
def test_padded_rows_equal_separate_sequences(family):
    compare(tiny_model(family).double(), SHORT, Layout("padded"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", families(*KINDS))
def test_several_answers_share_their_prefix(family, layout):
    compare_groups(tiny_model(family).double(), Layout(layout))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", families("qwen3_5"))
def test_gradient_checkpointing(family, reentrant):
    model = tiny_model(family).double()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    compare(model, SHORT, SHARED)


def with_adapter(family):
    """A model in float64 with an adapter on all linear layers, which changes its outputs."""
    peft = pytest.importorskip("peft", reason="needs the extra `peft`")
    model = tiny_model(family)
    # PEFT refuses this one for these, whose kernel for a whole layer takes its weight alone
    excluded = ["out_proj"] if family in ("falcon_h1", "mamba2", "nemotron_h") else None
    config = peft.LoraConfig(r=2, target_modules="all-linear", exclude_modules=excluded)
    model = peft.get_peft_model(model, config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    return model


@pytest.mark.parametrize("family", families("qwen3_5"))
def test_an_adapter_on_all_linear_layers(family):
    model = with_adapter(family)
    assert why_not_packed(model) is None
    compare(model, SHORT, SHARED)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "reentrant"), [("shared", True), ("shared", False), ("unshared", False)]
)
@pytest.mark.parametrize("family", RECURRENT_FAMILIES)
def test_several_answers_with_an_adapter_and_checkpointing(family, layout, reentrant):
    model = with_adapter(family)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    compare_groups(model, Layout(layout))


@pytest.mark.slow
@pytest.mark.parametrize("family", RECURRENT_FAMILIES)
def test_a_model_without_weights_takes_the_layout_of_the_whole(tmp_path, family):
    tiny_model(family).config.save_pretrained(tmp_path)
    assert why_not_packed(load_skeleton(str(tmp_path), dtype="bfloat16")) is None


@pytest.mark.slow
@pytest.mark.parametrize("family", RECURRENT_FAMILIES)
def test_a_run_in_packed_rows_equals_one_in_padded_rows(tmp_path, family):
    losses = {}
    # the auxiliary loss of routers depends on which pairs share a row
    plain = {"max_steps": 3, "learning_rate": 1e-4, "router_aux_loss_coef": 0.0}
    pairs = token_pairs(8, vocab_size=VOCAB_SIZE)
    for layout in ("auto", "padded"):
        options = {**plain, "layout": layout}
        trainer = make_trainer(tmp_path / layout, tiny_model(family), pairs, options=options)
        trainer.train()
        assert trainer.layout.name == ("shared" if layout == "auto" else layout)
        logs = [log for log in trainer.state.log_history if "grad_norm" in log]
        losses[layout] = torch.tensor([(log["loss"], log["grad_norm"]) for log in logs])
    # Adam makes whole steps of gradients that are nothing but rounding.
    torch.testing.assert_close(losses["auto"], losses["padded"], rtol=5e-4, atol=1e-5)


@pytest.mark.parametrize("family", families(*KINDS))
def test_outside_of_packed_rows_the_model_is_stock(family):
    model, other = tiny_model(family).double(), tiny_model(family).double()
    names, home = home_of(model)
    functions = {name: getattr(home, name) for name in (*names.functions, *names.whole)}
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        with micro_batch(model, SHARED.collate(SHORT.sequences)):
            assert torch.equal(other(ids, use_cache=False).logits, expected)
        with micro_batch(model, Layout("padded").collate(SHORT.sequences)):
            mixers = [m for m in model.modules() if type(m).__name__ == names.mixer]
            assert mixers
            assert not [mixer for mixer in mixers if "forward" in vars(mixer)]
        assert torch.equal(model(ids, use_cache=False).logits, expected)
    assert not [mixer for mixer in mixers if "forward" in vars(mixer)]
    assert {name: getattr(home, name) for name in functions} == functions


def test_functions_are_put_back_after_an_error():
    model = tiny_model("lfm2")
    _, home = home_of(model)
    function = home.causal_conv1d_fn
    model.model.layers[0].conv.out_proj.forward = None
    batch = SHARED.collate(SHORT.sequences)
    with micro_batch(model, batch), pytest.raises(TypeError):
        run_body(model, batch)
    assert home.causal_conv1d_fn is function


def ignoring_the_state(own):
    """A kernel that starts every part from nothing."""

    def function(*args, initial_state=None, initial_states=None, **kwargs):
        return own(*args, **kwargs)

    return function


def carrying_on(own):
    """A kernel that starts every part from the state that the part before has left."""
    left = [None]

    def function(*args, initial_state=None, output_final_state=False, **kwargs):
        more = {"initial_state": left[0], "output_final_state": True}
        output, left[0] = own(*args, **more, **kwargs)
        return output, left[0]

    return function


@pytest.mark.parametrize(
    ("family", "name", "broken"),
    [
        ("qwen3_5", "torch_chunk_gated_delta_rule", ignoring_the_state),
        ("qwen3_5", "torch_chunk_gated_delta_rule", carrying_on),
        ("granitemoehybrid", "mamba2_chunk_scan", ignoring_the_state),
    ],
)
def test_kernels_that_ignore_where_sequences_begin_are_refused(monkeypatch, family, name, broken):
    model = tiny_model(family)
    _, home = home_of(model)
    check_layout(SHARED, model)
    monkeypatch.setattr(home, name, broken(getattr(home, name)))
    with pytest.raises(ConfigError, match="other hidden states than padded ones"):
        check_layout(SHARED, model)


@pytest.mark.parametrize("layout", ["shared", "unshared"])
@pytest.mark.parametrize("family", [*KINDS, pytest.param("kimi_linear", marks=pytest.mark.slow)])
def test_running_straight_through_a_row_is_refused(monkeypatch, family, layout):
    """Each of a family's functions matters."""
    model = tiny_model(family)
    names, _ = home_of(model)
    for name in names.functions:
        functions = {**names.functions, name: lambda own, _: own}
        replaced = dataclasses.replace(names, functions=functions)
        monkeypatch.setitem(NAMES, model.config.model_type, replaced)
        with pytest.raises(ConfigError, match="other hidden states than padded ones"):
            check_layout(Layout(layout), model)


def test_a_run_with_such_a_kernel_stops_before_its_first_step(tmp_path, monkeypatch):
    model = tiny_model("qwen3_5")
    _, home = home_of(model)
    own = home.torch_chunk_gated_delta_rule
    monkeypatch.setattr(home, "torch_chunk_gated_delta_rule", ignoring_the_state(own))
    trainer = make_trainer(
        tmp_path, model, token_pairs(4, vocab_size=VOCAB_SIZE), options={"max_steps": 1}
    )
    with pytest.raises(ConfigError, match="use layout: padded"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("family", KINDS)
def test_functions_of_other_names_are_refused(monkeypatch, family):
    model = tiny_model(family)
    names, home = home_of(model)
    for name in (*names.functions, *names.whole):
        with monkeypatch.context() as patch:
            patch.delattr(home, name)
            reason = f"this version of transformers has no {name} for {names.mixer}"
            assert why_not_packed(model) == reason
            for layout in ("auto", "shared", "unshared"):
                with pytest.raises(ModelError, match=f"{reason}; set layout: padded"):
                    choose_layout(layout, model, 0)
            assert choose_layout("padded", model, 0).name == "padded"


@pytest.mark.slow
def test_a_run_with_functions_of_other_names_is_refused_before_its_first_step(
    tmp_path, monkeypatch
):
    model = tiny_model("qwen3_5")
    _, home = home_of(model)
    renamed = home.torch_chunk_gated_delta_rule
    monkeypatch.delattr(home, "torch_chunk_gated_delta_rule")
    monkeypatch.setattr(home, "gated_delta_rule", renamed, raising=False)
    pairs = token_pairs(4, vocab_size=VOCAB_SIZE)
    with pytest.raises(ModelError, match="has no torch_chunk_gated_delta_rule for Qwen3_5Gated"):
        make_trainer(tmp_path, model, pairs, options={"max_steps": 1})


@pytest.mark.parametrize("family", KINDS)
def test_layers_that_call_functions_of_other_names_are_refused(monkeypatch, family):
    """The known names are still there, but the layers call others."""
    model = tiny_model(family)
    names, home = home_of(model)
    mixer = getattr(home, names.mixer)
    forward = mixer.forward.__wrapped__
    renamed = types.FunctionType(forward.__code__, dict(vars(home)), closure=forward.__closure__)
    renamed.__kwdefaults__, renamed.__defaults__ = forward.__kwdefaults__, forward.__defaults__
    monkeypatch.setattr(mixer, "forward", renamed)
    with pytest.raises(ModelError, match=f"{names.mixer} ran a packed row without calling causal"):
        check_model(model, SHARED, torch.device("cpu"), None)


def test_layers_of_another_class_are_padded(monkeypatch):
    model = tiny_model("qwen3_5")
    names, _ = home_of(model)
    other = dataclasses.replace(names, mixer="GatedDelta")
    monkeypatch.setitem(NAMES, model.config.model_type, other)
    reason = (
        "0 of its 2 layers with a state or a convolution are a GatedDelta, and only that is known"
    )
    assert why_not_packed(model) == reason


def test_a_kernel_for_a_whole_layer_does_not_run_in_packed_rows(monkeypatch):
    model = tiny_model("granitemoehybrid")
    names, home = home_of(model)
    (name,) = names.whole
    calls = []
    monkeypatch.setattr(home, name, lambda *_, **__: calls.append(name))
    batch = SHARED.collate(SHORT.sequences)
    model.train()
    with micro_batch(model, batch):
        run_body(model, batch)
    assert not calls
    model(torch.arange(9)[None], use_cache=False)
    assert len(calls) == 2


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_a_kernel_for_a_whole_layer_does_not_run_beside_an_adapter(monkeypatch, layout):
    """It takes the weight of the layer at its end, without the adapter."""
    peft = pytest.importorskip("peft", reason="needs the extra `peft`")
    model = tiny_model("granitemoehybrid")
    names, home = home_of(model)
    (name,) = names.whole
    calls = []
    monkeypatch.setattr(home, name, lambda *_, **__: calls.append(name))
    batch = Layout(layout).collate(SHORT.sequences)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["out_proj"]))
    model.train()
    with micro_batch(model, batch):
        run_body(model, batch).sum().backward()
    assert not calls
    gradients = [p.grad for n, p in model.named_parameters() if "out_proj.lora_B" in n]
    assert len(gradients) == 2
    assert all(gradient is not None and gradient.any() for gradient in gradients)


def test_a_cache_is_refused():
    model = tiny_model("qwen3_5")
    batch = SHARED.collate(SHORT.sequences)
    with micro_batch(model, batch), pytest.raises(ModelError, match="with a cache of earlier"):
        body_of(model)(
            batch.input_ids,
            position_ids=batch.position_ids,
            shared_layout=batch.shared_layout,
            use_cache=True,
        )


def test_models_without_such_layers_are_left_alone():
    model = tiny_model("llama")
    layout = SHARED.collate(SHORT.sequences).shared_layout
    assert recurrent.why_not_replaced(model) is None
    with recurrent.packed_recurrence(model, layout):
        assert not [module for module in model.modules() if "forward" in vars(module)]
