"""Packed rows through emulated kernels of other packages: exact, two calls a layer, or refused."""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
from functools import partial

import pytest
import torch

from dpofast.data.packing.collate import Layout
from dpofast.errors import ConfigError, ModelError
from dpofast.model import checks, recurrent_kernels
from dpofast.model.checks import check_layout, check_model
from dpofast.model.recurrent import describe_recurrence, needs_device
from dpofast.model.recurrent_families import RECURRENT_FAMILIES as NAMES
from dpofast.model.recurrent_kernels import RecurrentKernel
from tests.exactness import SHORT, compare
from tests.families import VOCAB_SIZE, tiny_model
from tests.model.test_recurrent import compare_groups
from tests.recurrent_families import RECURRENT_FAMILIES
from tests.recurrent_kernels import install
from tests.support import make_trainer, token_pairs

CPU = torch.device("cpu")
SHARED = Layout("shared")
# The kernel of each family's recurrence; LFM's layers have none.
DELTA = {
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_next"), "chunk_gated_delta_rule"),
    **{"olmo_hybrid": "chunk_gated_delta_rule", "kimi_linear": "chunk_kda"},
}
# One family of each kind.
KINDS = ("qwen3_5", "kimi_linear", "granitemoehybrid", "lfm2")
QUICK = "qwen3_5"


def families(names):
    """Families, as parameters of a test that is slow for all but one of them."""
    slow = pytest.mark.slow
    return [pytest.param(name, marks=() if name == QUICK else slow) for name in names]


@pytest.fixture(autouse=True)
def _fresh_imports():
    recurrent_kernels._imported.cache_clear()
    yield
    recurrent_kernels._imported.cache_clear()


def num_mixers(model):
    mixer = NAMES[model.config.model_type].mixer
    return sum(type(module).__name__ == mixer for module in model.modules())


@pytest.mark.parametrize("layout", ["shared", pytest.param("unshared", marks=pytest.mark.torture)])
@pytest.mark.parametrize("family", families(RECURRENT_FAMILIES))
def test_packed_rows_equal_separate_sequences(monkeypatch, family, layout):
    model = tiny_model(family).double()
    kernels = install(monkeypatch, model)
    compare(model, SHORT, Layout(layout))
    count = num_mixers(model)
    groups = Layout(layout).collate(SHORT.sequences).shared_layout.groups
    firsts = [prefix for prefix, _ in groups]
    tails = [length for _, each in groups for length in each if length]
    if family in DELTA:
        expected = [firsts, tails] if tails else [firsts]
        assert kernels.lengths(DELTA[family]) == expected * count
    elif family not in ("lfm2", "lfm2_moe", "lfm3"):
        # the kernel ran each separate sequence, and each part of the packed row
        parts = [prefix_or_tail for prefix, each in groups for prefix_or_tail in (prefix, *each)]
        sequences = [len(prompt) + len(answer) for prompt, answer in SHORT.sequences]
        found = [length for (length,) in kernels.lengths("mamba_chunk_scan_combined")]
        assert sorted(found) == sorted([*filter(None, parts), *sequences] * count)
    if family != "lfm3":  # transformers chooses no kernel there
        convolutions = [name for name, _ in kernels.calls].count("causal_conv1d_fn")
        assert convolutions == (len(SHORT.sequences) + 1) * count  # one call for the packed row


@pytest.mark.slow
def test_several_answers_share_their_prefix(monkeypatch):
    model = tiny_model("qwen3_5").double()
    kernels = install(monkeypatch, model)
    compare_groups(model, SHARED)
    assert len(kernels.lengths("chunk_gated_delta_rule")) == 2 * num_mixers(model)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "family", ["qwen3_5", pytest.param("kimi_linear", marks=pytest.mark.torture)]
)
def test_gradient_checkpointing(monkeypatch, family, reentrant):
    model = tiny_model(family).double()
    kernels = install(monkeypatch, model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    compare(model, SHORT, SHARED)
    # forward, and once more in the backward
    assert len(kernels.lengths(DELTA[family])) == 4 * num_mixers(model)


@pytest.mark.parametrize("family", families(KINDS))
def test_the_start_up_check_passes_and_names_the_kernels(monkeypatch, family):
    model = tiny_model(family)
    install(monkeypatch, model)
    lines = [line for line in check_model(model, SHARED, CPU, None) if "state" in line]
    package = "flash-linear-attention, in one call for all prefixes and one for all tails"
    expected = {
        "qwen3_5": f"in chunk_gated_delta_rule of {package}",
        "kimi_linear": f"in chunk_kda of {package}",
        "granitemoehybrid": "part by part, in mamba_chunk_scan_combined of mamba-ssm, which takes "
        "one state for a whole row",
    }
    words = expected.get(family)
    assert lines == ([] if words is None else [f"Layers with a state: {words}"])


def test_without_kernels_the_log_says_so(monkeypatch):
    model = tiny_model("qwen3_5")
    words = describe_recurrence(model, CPU)
    assert words == "part by part, in transformers' torch functions"
    words = describe_recurrence(model, torch.device("cuda"))
    assert "chunk_gated_delta_rule of flash-linear-attention can't be imported" in words
    assert "(ModuleNotFoundError: No module named 'fla')" in words
    kernel = RecurrentKernel("old", "collections", "namedtuple", True)
    words = kernel.describe(torch.device("cuda"))
    assert words == (
        "part by part, in namedtuple of old, which takes no cu_seqlens and no initial_state and no "
        "output_final_state"
    )
    assert kernel.for_sequences(torch.device("cuda")) is None
    assert describe_recurrence(tiny_model("llama"), CPU) is None


def test_kernels_do_not_run_on_other_devices(monkeypatch):
    model = tiny_model("qwen3_5")
    kernels = install(monkeypatch, model)
    monkeypatch.setattr(recurrent_kernels, "KERNEL_DEVICES", frozenset({"cuda"}))
    check_layout(SHARED, model)
    assert not kernels.lengths("chunk_gated_delta_rule")  # no call names sequences


def test_a_model_is_checked_where_its_kernels_run(monkeypatch):
    model = tiny_model("qwen3_5")
    cuda, moved = torch.device("cuda"), []
    monkeypatch.setattr(model, "to", lambda device: moved.append(device.type))
    with checks.where_kernels_run(model, cuda):
        assert not moved  # none is installed
    install(monkeypatch, model)
    monkeypatch.setattr(recurrent_kernels, "KERNEL_DEVICES", frozenset({"cuda"}))
    with checks.where_kernels_run(model, CPU):
        assert not moved
    with checks.where_kernels_run(model, cuda):
        assert moved == ["cuda"]
    assert moved == ["cuda", "cpu"]
    # Mixers that run padded have such kernels, too.
    assert needs_device(tiny_model("mamba"), cuda)
    assert not needs_device(tiny_model("mamba"), CPU)
    assert not needs_device(tiny_model("llama"), cuda)


def test_kernels_that_fail_are_named(monkeypatch):
    model = tiny_model("qwen3_5")
    function = sys.modules[type(model).__module__].torch_chunk_gated_delta_rule

    def fails(*_, **__):
        raise RuntimeError("no such instruction\nand more lines")

    monkeypatch.setattr(sys.modules[function.__module__], function.__name__, fails)
    with pytest.raises(RuntimeError, match="and more lines"):
        check_model(model, SHARED, CPU, None)
    monkeypatch.setattr(checks, "needs_device", lambda *_: True)
    sentence = r"doesn't run on cpu \(RuntimeError: no such instruction\), where kernels of other"
    with pytest.raises(ConfigError, match=sentence):
        check_model(model, SHARED, CPU, None)


def test_all_checks_of_a_run_are_where_the_kernels_are(monkeypatch, tmp_path):
    """DeepSpeed leaves a policy on the CPU until its engine is made."""
    model = tiny_model("qwen3_5")
    trainer = make_trainer(tmp_path, model, token_pairs(2, vocab_size=VOCAB_SIZE))
    places, seen = [], []

    @contextlib.contextmanager
    def moved(policy, device):
        assert policy is model
        places.append(device)
        yield
        places.pop()

    module = "dpofast.train.reference.run_reference."
    monkeypatch.setattr(module + "where_kernels_run", moved)
    monkeypatch.setattr(module + "random_modules", lambda _: seen.append(list(places)) or {})
    trainer.reference.settle()
    assert seen == [[trainer.args.device]]
    assert not places


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", families(KINDS[:3]))
def test_kernels_that_swallow_boundaries_are_refused(monkeypatch, family, dtype):
    """In bf16, too, where hidden states alone wouldn't show it."""
    model = tiny_model(family).to(dtype)
    kernels = install(monkeypatch, model)
    check_layout(SHARED, model)
    for kernels.boundaries in ("hidden", "swallowed"):
        is_seen = kernels.boundaries == "swallowed" and family in DELTA
        error = ModelError if is_seen else ConfigError
        match = (
            "can't run packed rows .*gave 1 final states for 2"
            if is_seen
            else "other (hidden states|outputs)"
        )
        with pytest.raises(error, match=match) as caught:
            check_layout(SHARED, model)
        assert "layout: padded" in str(caught.value)
    if family in DELTA:
        with pytest.raises(ConfigError, match=r"other (hidden states|outputs)"):
            check_layout(Layout("unshared"), model)


def boundaries_to(own, parts):
    """A function that gets the boundaries, as kernels take them, and may swallow them."""
    bounds = torch.tensor((0, *parts.lengths)).cumsum(0).int()
    index = torch.arange(len(parts.lengths)).repeat_interleave(torch.tensor(parts.lengths))[None]
    return partial(inspect.unwrap(own), cu_seqlens=bounds, seq_idx=index.int())


@pytest.mark.slow
@pytest.mark.parametrize("family", KINDS)
def test_fallbacks_that_swallow_boundaries_stop_a_run_before_its_first_step(
    tmp_path, monkeypatch, family
):
    """transformers' torch functions take cu_seqlens and seq_idx, and ignore them."""
    model = tiny_model(family)
    names = NAMES[model.config.model_type]
    for number, name in enumerate(names.functions):
        with monkeypatch.context() as patch:
            functions = {**names.functions, name: boundaries_to}
            values = {**vars(names), "functions": functions}
            patch.setitem(NAMES, model.config.model_type, type(names)(**values))
            pairs = token_pairs(4, vocab_size=VOCAB_SIZE)
            trainer = make_trainer(tmp_path / str(number), model, pairs, options={"max_steps": 1})
            with pytest.raises(ConfigError, match=r"other hidden states .* use layout: padded"):
                trainer.train()
            assert trainer.state.global_step == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", KINDS[:3])
def test_kernels_that_swallow_boundaries_stop_a_run_before_its_first_step(
    tmp_path, monkeypatch, family
):
    model = tiny_model(family)
    install(monkeypatch, model).boundaries = "swallowed"
    pairs = token_pairs(4, vocab_size=VOCAB_SIZE)
    trainer = make_trainer(tmp_path, model, pairs, options={"max_steps": 1})
    with pytest.raises((ConfigError, ModelError), match="layout: padded"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.slow
def test_a_run_with_kernels_logs_them(tmp_path, monkeypatch, caplog):
    model = tiny_model("qwen3_5")
    kernels = install(monkeypatch, model)
    pairs = token_pairs(4, vocab_size=VOCAB_SIZE)
    with caplog.at_level(logging.INFO, logger="dpofast"):
        make_trainer(tmp_path, model, pairs, options={"max_steps": 2}).train()
    assert "Layers with a state: in chunk_gated_delta_rule of flash-linear-attention" in caplog.text
    assert kernels.lengths("chunk_gated_delta_rule")
