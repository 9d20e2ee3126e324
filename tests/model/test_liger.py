"""Liger's layers on a CPU: plain twins in their place, which the same wiring puts into a model."""

from __future__ import annotations

import copy
import logging
import sys
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llama import modeling_llama

from dpofast import DPOConfig
from dpofast.data.packing.collate import Layout
from dpofast.errors import ConfigError
from dpofast.model import checks, liger
from dpofast.model.checks import check_liger, check_model, sample_sequences
from dpofast.model.forward import micro_batch, run_body
from dpofast.model.liger import liger_names, use_liger
from dpofast.options.liger import liger_kinds
from dpofast.train.reports.summary import reference_summary
from tests import liger as twins
from tests.families import tiny_model
from tests.support import make_trainer, tiny_llama, train

ON = {"use_liger_kernel": True}
NAMES = ["LigerRMSNorm", "LigerSwiGLUMLP", "liger_rotary_pos_emb"]


@pytest.fixture
def _twins(monkeypatch: pytest.MonkeyPatch) -> None:
    twins.install_twins(monkeypatch)


def states(model: Any, layout: str = "shared") -> torch.Tensor:
    batch = Layout(layout).collate(sample_sequences(model))
    with torch.no_grad(), micro_batch(model, batch):
        return run_body(model, batch)


@pytest.mark.usefixtures("_twins")
class TestInAModel:
    @pytest.mark.parametrize("layout", ["shared", "unshared", "padded"])
    def test_every_layer_runs_ligers_forward_in_a_micro_batch(self, layout: str) -> None:
        model = tiny_llama()
        expected = states(model, layout)
        use_liger(model, twins.KINDS)
        assert not twins.calls
        torch.testing.assert_close(states(model, layout), expected, rtol=1e-5, atol=1e-5)
        assert twins.calls == {"norm": 5, "mlp": 2, "rope": 2}

    def test_outside_the_model_and_its_family_are_stock(self) -> None:
        model, other = tiny_llama(), tiny_llama()
        before = dict(vars(modeling_llama))
        own = [type(module).__name__ for module in model.modules()]
        use_liger(model, twins.KINDS)
        assert dict(vars(modeling_llama)) == before
        assert not [m for m in model.modules() if "forward" in m.__dict__]
        assert [module._get_name() for module in model.modules()] == own
        model(torch.tensor([[1, 2, 3]]))
        states(other)
        copied = copy.deepcopy(model)
        states(copied)
        assert not twins.calls
        states(model)
        assert dict(vars(modeling_llama)) == before

    def test_layers_are_taken_away_again(self) -> None:
        model = tiny_llama()
        use_liger(model, twins.KINDS)
        assert liger_names(model) == NAMES
        use_liger(model, None)
        states(model)
        assert not twins.calls
        assert liger_names(model) == []

    def test_kinds_can_be_left_out(self) -> None:
        model = tiny_llama()
        use_liger(model, {**twins.KINDS, "rope": False})
        assert liger_names(model) == NAMES[:2]
        states(model)
        assert twins.calls["rope"] == 0

    def test_the_model_inside_an_adapter_has_them(self) -> None:
        peft = pytest.importorskip("peft", reason="needs the extra `peft`")
        targets = ["gate_proj", "q_proj"]
        model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=targets))
        use_liger(model, twins.KINDS)
        states(model)
        assert twins.calls == {"norm": 5, "mlp": 2, "rope": 2}

    def test_on_a_cpu_the_models_own_layers_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Checks run a model before it has come to its GPU."""
        model = tiny_llama()
        use_liger(model, twins.KINDS)
        monkeypatch.setattr(liger, "DEVICE_TYPES", {"cuda"})
        states(model)
        check_model(model, Layout("shared"), torch.device("cpu"), None)
        assert not twins.calls

    def test_one_line_where_liger_has_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        model = tiny_model("gpt_neox")
        with caplog.at_level(logging.WARNING, "dpofast"):
            use_liger(model, twins.KINDS)
        (line,) = [record.getMessage() for record in caplog.records]
        expected = "use_liger_kernel: Liger has no layers for GPTNeoXForCausalLM; its own run."
        assert line == expected
        states(model)

    def test_another_activation_keeps_the_models_own(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = tiny_llama(hidden_act="gelu")
        expected = states(model)
        with caplog.at_level(logging.WARNING, "dpofast"):
            use_liger(model, twins.KINDS)
        assert "another activation" in caplog.text
        torch.testing.assert_close(states(model), expected, rtol=1e-5, atol=1e-5)
        assert twins.calls["mlp"] == 0

    def test_wrong_layers_are_found_before_the_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_llama()
        use_liger(model, twins.KINDS)
        check_liger(model)

        def wrong(q: Any, k: Any, cos: Any, sin: Any) -> Any:
            return twins.liger_rotary_pos_emb(q, k, cos, -sin)

        functions = liger._LAYERS[model].functions[modeling_llama]
        monkeypatch.setitem(functions, "apply_rotary_pos_emb", wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="give LlamaForCausalLM other hidden states"):
            check_liger(model)

    def test_layers_that_fail_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_llama()
        use_liger(model, twins.KINDS)

        def fails(*_: Any) -> Any:
            raise RuntimeError("no driver\nand more lines")

        functions = liger._LAYERS[model].functions[modeling_llama]
        monkeypatch.setitem(functions, "apply_rotary_pos_emb", fails)  # type: ignore[arg-type]
        sentence = r"layers fail in LlamaForCausalLM \(RuntimeError: no driver\); leave the option"
        with pytest.raises(ConfigError, match=sentence):
            check_liger(model)

    def test_a_model_that_is_elsewhere_is_moved_for_the_check(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, moved = tiny_llama(), []
        monkeypatch.setattr(model, "to", lambda device: moved.append(device.type))
        monkeypatch.setattr(liger, "DEVICE_TYPES", {"cuda"})
        for kinds, places in ((None, []), (twins.KINDS, ["cuda", "cpu"])):
            use_liger(model, kinds)
            with checks.where_kernels_run(model, torch.device("cuda")):
                assert moved == places[:1]
            assert moved == places

    def test_a_patch_that_fails_is_named_and_leaves_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def half(model: Any, **_: Any) -> None:
            modeling_llama.LlamaMLP = twins.LigerSwiGLUMLP  # type: ignore[misc,assignment]
            raise NotImplementedError("not for this one")

        monkeypatch.setattr(
            sys.modules["liger_kernel.transformers"], "_apply_liger_kernel_to_instance", half
        )
        before = modeling_llama.LlamaMLP
        with pytest.raises(ConfigError, match=r"can't patch LlamaForCausalLM \(not for this one\)"):
            use_liger(tiny_llama(), twins.KINDS)
        assert modeling_llama.LlamaMLP is before

    def test_calls_that_the_kernel_would_misread_take_the_familys_own(self) -> None:
        used: list[str] = []
        rope = liger._guarded(
            lambda *_, **__: used.append("own"), lambda *_, **__: used.append("liger")
        )
        query = torch.zeros(2, 4, 5, 8)
        one, each, few = (torch.zeros(n, m, 8) for n, m in ((1, 5), (2, 5), (1, 4)))
        for cos in (one, each, few, one[0]):
            rope(query, query, cos, cos)
        rope(query.transpose(1, 2), query, one, one, unsqueeze_dim=2)
        assert used == ["liger", "liger", "own", "own", "own"]


class TestLayersOfAScriptsOwn:
    def test_they_are_named(self) -> None:
        model = tiny_llama()

        def forward(self: Any, x: Any) -> Any:
            return x

        forward.__module__, forward.__qualname__ = "liger_kernel.transformers.x", "LigerX.forward"
        model.model.norm.forward = MethodType(forward, model.model.norm)
        assert liger_names(model) == ["LigerX"]


@pytest.mark.usefixtures("_twins")
class TestInARun:
    @pytest.mark.slow
    def test_it_trains_as_without(self, tmp_path: Any) -> None:
        options = {"max_steps": 3, "gradient_checkpointing": True}
        expected = train(make_trainer(tmp_path / "a", options=options))
        made = make_trainer(tmp_path / "b", options={**options, **ON})
        np.testing.assert_allclose(train(made), expected, rtol=1e-4)
        assert twins.calls["norm"] > 5
        assert not [m for m in made.model.modules() if "forward" in m.__dict__]
        assert made.args.use_liger_kernel is True

    @pytest.mark.slow
    def test_stored_log_probs_of_other_layers_arent_taken(self, tmp_path: Any) -> None:
        def scored(**options: Any) -> int:
            made = make_trainer(tmp_path, options=options)
            made.score_datasets()
            description = made.reference.identity.description
            assert description.get("layers") == (NAMES if options else None)
            return int(reference_summary(made.reference)["ref_rows_scored"])

        assert scored() > 0
        assert scored(**ON) > 0
        assert scored() == scored(**ON) == 0

    @pytest.mark.slow
    @pytest.mark.parametrize("has_reference", [False, True])
    def test_a_run_may_switch_when_it_resumes(self, tmp_path: Any, has_reference: bool) -> None:
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}

        def made(**more: Any) -> Any:
            models = {"ref_model": tiny_llama(1)} if has_reference else {}
            return make_trainer(tmp_path, options={**options, **more}, **models)

        expected = train(made())
        resumed = made(**ON)
        resumed.train(str(tmp_path / "run" / "checkpoint-2"))
        got = [log["loss"] for log in resumed.state.log_history if "grad_norm" in log]
        np.testing.assert_allclose(got, [loss for loss, *_ in expected], rtol=1e-4)
        description = resumed.reference.identity.description
        assert description.get("layers") == (NAMES if has_reference else None)

    def test_a_reference_has_them_too(self, tmp_path: Any) -> None:
        made = make_trainer(tmp_path, ref_model=tiny_llama(1), options=ON)
        made.score_datasets()
        assert liger_names(made.reference.ref_model) == NAMES
        assert twins.calls["norm"] > 0


class TestOptions:
    def config(self, folder: Any, **options: Any) -> DPOConfig:
        return DPOConfig(str(folder), use_cpu=True, **options)

    def test_a_cpu_is_refused(self, tmp_path: Any) -> None:
        with pytest.raises(ConfigError, match="use_liger_kernel: Liger's layers need a GPU"):
            self.config(tmp_path, **ON)

    def test_a_missing_package_is_named(
        self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        twins.allow_cpu(monkeypatch)
        monkeypatch.setattr("dpofast.options.liger._is_here", lambda: False)
        with pytest.raises(ConfigError, match=r"pip install 'liger-kernel>=0.8.5'"):
            self.config(tmp_path, **ON)

    @pytest.mark.usefixtures("_twins")
    @pytest.mark.parametrize(
        ("kinds", "sentence"),
        [
            ("rope", "liger_kernel_config: got 'rope', expected a mapping"),
            ({"ropes": True}, "liger_kernel_config: 'ropes' is unknown; choose among rope"),
            ({"rope": "no"}, "liger_kernel_config: rope: got 'no', expected true or false"),
            ({"cross_entropy": True}, "cross_entropy isn't supported, as head and loss are dpo"),
            ({"fused_linear_cross_entropy": True}, "fused_linear_cross_entropy isn't supported"),
        ],
    )
    def test_kinds_are_checked(self, tmp_path: Any, kinds: Any, sentence: str) -> None:
        with pytest.raises(ConfigError, match=sentence):
            self.config(tmp_path, **ON, liger_kernel_config=kinds)

    @pytest.mark.usefixtures("_twins")
    def test_head_and_loss_are_never_ligers(self, tmp_path: Any) -> None:
        made = self.config(tmp_path, **ON, liger_kernel_config={"swiglu": False})
        assert liger_kinds(made) == {"swiglu": False, **twins.KINDS}
        assert liger_kinds(self.config(tmp_path)) is None

    def test_kinds_alone_have_no_effect(
        self, tmp_path: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, "dpofast"):
            self.config(tmp_path, liger_kernel_config={"rope": False})
        assert "liger_kernel_config={'rope': False} (use_liger_kernel is false)" in caplog.text
