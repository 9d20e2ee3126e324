"""Packed rows against separate sequences: hidden states, loss and every gradient, in float64."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dpofast.data.packing.collate import Layout
from dpofast.errors import ConfigError, ModelError
from dpofast.model.attention import recorded_calls
from dpofast.model.checks import check_layout, check_rows
from dpofast.model.dropout import disable_dropout
from dpofast.model.forward import micro_batch, run_batch, run_body
from dpofast.model.head import PairLossTask, head_options
from dpofast.model.load import load_skeleton
from dpofast.model.model_types import NOT_PACKABLE, PACKABLE
from dpofast.model.packable import attention_limits, choose_layout, why_not_packed
from dpofast_kernels import make_loss
from tests.exactness import SHORT, compare
from tests.families import (
    DEAF_FAMILIES,
    FAMILIES,
    MASKED_FAMILIES,
    MIXING_FAMILIES,
    OTHER_PACKABLE_FAMILIES,
    PACKABLE_FAMILIES,
    UNPACKABLE_FAMILIES,
    tiny_model,
)
from tests.model_types import type_when_loaded
from tests.newer_families import MULTIMODAL_PACKABLE, MULTIMODAL_PADDED, NEWER_PADDED
from tests.recurrent_families import RECURRENT_FAMILIES
from tests.support import make_trainer, tiny_llama, tiny_mixtral, train

PADDED = {
    **{**DEAF_FAMILIES, **MASKED_FAMILIES, **MIXING_FAMILIES, **UNPACKABLE_FAMILIES},
    **{**NEWER_PADDED, **MULTIMODAL_PADDED},
}
NOT_COMPARED = {"xglm"}  # its mask can't be made in float64
NO_SDPA = {"gemma2", "gpt_oss", "mamba", "bloom"}  # transformers refuses sdpa for these


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["shared", "unshared", "padded"])
@pytest.mark.parametrize("family", PACKABLE_FAMILIES)
def test_every_layout_equals_separate_sequences(family, name):
    compare(tiny_model(family).double(), SHORT, Layout(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shared", "unshared"])
@pytest.mark.parametrize("family", {**OTHER_PACKABLE_FAMILIES, **MULTIMODAL_PACKABLE})
def test_all_model_types_that_are_packed_equal_separate_sequences(family, name):
    class_name, _ = FAMILIES[family]
    if not hasattr(transformers, class_name):
        pytest.skip(f"transformers {transformers.__version__} has no {class_name}")
    model = tiny_model(family).double()
    disable_dropout(model)  # the noise of PhiMoE's routers
    assert choose_layout("auto", model, 0).name == "shared"
    compare(model, SHORT, Layout(name))


@pytest.mark.slow
@pytest.mark.parametrize("family", PADDED)
def test_all_others_are_padded_with_their_reason_and_right(family):
    model = tiny_model(family).double()
    disable_dropout(model)
    assert why_not_packed(model) == NOT_PACKABLE[model.config.model_type]
    if family == "moshi" and Version(transformers.__version__) < Version("5.23"):
        with pytest.raises(ModelError, match="gives a sequence other hidden states"):
            check_rows(model)
        return
    compare(model, SHORT, Layout("padded"))


def test_every_packable_model_type_is_compared():
    """A model type that is added to the list needs a model in the tests as well."""
    families = {**PACKABLE_FAMILIES, **OTHER_PACKABLE_FAMILIES, **RECURRENT_FAMILIES}
    families |= MULTIMODAL_PACKABLE
    classes = {getattr(transformers, name, None) for name, _ in families.values()} - {None}
    known = {type_when_loaded(name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    assert {type_when_loaded(each.model_type) for each in classes} == PACKABLE & known


def test_every_padded_model_type_is_compared():
    names = {name for name, _ in PADDED.values()}
    classes = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    known = {type_when_loaded(name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    expected = {*NOT_PACKABLE} & known - NOT_COMPARED
    assert {type_when_loaded(each.model_type) for each in classes} == expected


@pytest.mark.parametrize("family", {**DEAF_FAMILIES, **MASKED_FAMILIES, **MIXING_FAMILIES})
def test_the_reason_why_a_model_is_padded_is_named(family, caplog):
    caplog.set_level("INFO", logger="dpofast")
    assert choose_layout("auto", tiny_model(family), 0).name == "padded"
    (line,) = [record.message for record in caplog.records if "Layout: padded" in record.message]
    reason = {
        "minimax": "its layers with a state or a convolution carry one sequence of a row into",
        "nemotron": "its layers don't hand on to attention what it needs to know",
        "doge": "its attention is told what to look at by a mask alone",
        "gpt_neo": "its attention is told what to look at by a mask alone",
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
    compare(model, SHORT, layout)


@pytest.mark.parametrize("family", sorted({*PACKABLE_FAMILIES, *UNPACKABLE_FAMILIES} - NO_SDPA))
def test_padded_rows_are_right_under_sdpa(family):
    """Without a mask sdpa takes its kernel for causal rows."""
    compare(tiny_model(family, "sdpa").double(), SHORT, Layout("padded"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_row_with_nothing_scored_moves_nothing(family):
    """A rank without pairs runs such a row, of one token."""
    model = tiny_model(family)
    batch = Layout("padded").collate([], [])
    task = PairLossTask(
        batch.labels,
        batch.bounds,
        batch.ref_logps,
        make_loss("sigmoid", beta=SHORT.beta),
        head_options(model.config),
    )
    with micro_batch(model, batch):
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
    compare(model, SHORT, Layout("shared"))


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
    ("family", "window", "chunk"),
    [
        ("llama", None, None),
        ("qwen2", None, None),
        ("mistral with window", 6, None),
        ("gemma3", 6, None),
        ("gpt_oss", 6, None),
        ("llama4 with temperature", None, 5),
    ],
)
def test_the_window_and_the_chunk_that_layers_look_through(family, window, chunk):
    """They equal those that attention is really called with."""
    model = tiny_model(family)
    assert attention_limits(model) == (window, chunk)
    batch = Layout("shared").collate(SHORT.sequences)
    with recorded_calls() as calls, micro_batch(model, batch), torch.no_grad():
        run_body(model, batch)
    for name, value in (("window", window), ("chunk", chunk)):
        assert {getattr(call, name) for call in calls} - {None} == {value} - {None}


@pytest.mark.parametrize("family", [*PACKABLE_FAMILIES, *UNPACKABLE_FAMILIES])
def test_a_model_without_weights_takes_the_layout_of_the_whole(tmp_path, family):
    """With and without dropouts above 0 in its config."""
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


def test_training_with_dropout_is_padded_and_says_so_once(tmp_path, caplog):
    caplog.set_level("INFO", logger="dpofast")
    options = {"max_steps": 2, "disable_dropout": False}
    trainer = make_trainer(tmp_path, tiny_llama(attention_dropout=0.3), options=options)
    assert trainer.layout.name == "padded"
    with_dropout = train(trainer)
    lines = [record.message for record in caplog.records if "Layout: padded, as" in record.message]
    assert lines == ["Layout: padded, as LlamaAttention has a dropout above 0."]
    assert with_dropout != train(make_trainer(tmp_path / "without", options=options))


def test_a_routers_noise_is_a_dropout(tmp_path):
    expected = train(make_trainer(tmp_path, tiny_mixtral(), options={"max_steps": 2}))
    noisy = tiny_mixtral(router_jitter_noise=0.3)
    assert "has a dropout above 0" in why_not_packed(noisy)
    assert train(make_trainer(tmp_path, noisy, options={"max_steps": 2})) == expected


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("nested", [False, True])
def test_rope_that_depends_on_the_row_is_padded(kind, nested):
    model = tiny_model("gemma3" if nested else "llama")
    rope = {"rope_type": kind, "rope_theta": 10000.0}
    model.config.rope_parameters = {"full_attention": rope} if nested else rope
    assert why_not_packed(model) == "its RoPE depends on the longest position of a row"


def test_alibi_and_unknown_types_are_padded():
    model = tiny_model("llama")
    model.config.alibi = True
    assert why_not_packed(model) == "its ALiBi counts distances along the row"
    model.config.model_type = "marvellous"
    assert why_not_packed(model) == (
        "model type 'marvellous' isn't known to be right in packed rows"
    )
