"""The layers of the installed package, family by family, with plain functions for its kernels.

Its kernels need a GPU (tests/gpu/test_liger_gpu.py). What is tested here is which layers of a
family it replaces, with which arguments, and that packed rows stay exact with its RoPE.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import torch

pytest.importorskip("liger_kernel", reason="needs the extra `bench`")

from dpofast import DPOConfig
from dpofast.data.packing.collate import Layout
from dpofast.model.liger import liger_names, use_liger
from dpofast.model.router import check_router_loss, make_router_loss
from dpofast.options.liger import KINDS, OLDEST, _is_here
from tests import liger as twins
from tests.exactness import SHORT, compare
from tests.families import tiny_model

pytestmark = pytest.mark.peer

GATED = {"LigerRMSNorm", "LigerSwiGLUMLP", "liger_rotary_pos_emb"}
EXPERTS = {"LigerRMSNorm", "LigerExperts", "liger_rotary_pos_emb"}
GEMMA = {"LigerRMSNorm", "LigerGEGLUMLP", "liger_rotary_pos_emb"}
NAMES = {
    "llama": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "mistral with window": GATED,
    "olmo2": GATED,
    "granite": GATED,
    "smollm3": GATED,
    "exaone4": GATED,
    "ministral": GATED,
    "olmo3": GATED,
    "llama3 rope": GATED,
    "hunyuan_v1_dense": {"LigerRMSNorm", "LigerHunyuanV1SwiGLUMLP", "liger_rotary_pos_emb"},
    "deepseek_v2": {"LigerRMSNorm", "LigerExperts", "LigerQwen3MoeSwiGLUMLP"},
    "gemma4": {"LigerRMSNorm", "LigerGEGLUMLP"},
    "phi3": {"LigerRMSNorm", "LigerPhi3SwiGLUMLP", "liger_rotary_pos_emb"},
    "glm4": {"LigerRMSNorm", "LigerPhi3SwiGLUMLP"},
    "gemma": GEMMA,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    "gpt_oss": {"LigerRMSNorm", "liger_rotary_pos_emb_gpt_oss"},
    "qwen3_5": {"LigerRMSNorm", "LigerQwen3MoeSwiGLUMLP"},
    "qwen3_next": {"LigerRMSNorm", "LigerExperts", "LigerQwen3MoeSwiGLUMLP"},
    "falcon_h1": {"LigerRMSNorm", "LigerFalconH1SwiGLUMLP", "liger_rotary_pos_emb"},
    "nemotron": {"LigerReLUSquared"},
}
ONLY_PADDED = ("nemotron",)
UNKNOWN = ("gpt_neox", "opt", "cohere")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *((family, "padded" if family in ONLY_PADDED else "shared") for family in NAMES),
        *(("llama", "padded"), ("qwen3_5", "padded")),
    ],
)
def test_a_family_with_its_layers_is_exact(
    monkeypatch: pytest.MonkeyPatch, family: str, layout: str
) -> None:
    twins.install_plain_kernels(monkeypatch)
    model = tiny_model(family).double()
    use_liger(model, twins.KINDS)
    assert set(liger_names(model)) == NAMES[family]
    compare(model, SHORT, Layout(layout))
    has_rope = any("rotary" in name for name in NAMES[family])
    assert (twins.calls["rope"] > 0) == has_rope
    assert (twins.calls["activation"] > 0) == ("LigerReLUSquared" in NAMES[family])


def test_an_activation_is_replaced_in_micro_batches_alone() -> None:
    model = tiny_model("nemotron")
    before = dict(model.named_modules())
    use_liger(model, twins.KINDS)
    assert dict(model.named_modules()) == before
    assert liger_names(model) == ["LigerReLUSquared"]
    for layer in (other := tiny_model("nemotron")).model.layers:
        layer.mlp.act_fn = torch.nn.SiLU()
    use_liger(other, twins.KINDS)
    assert liger_names(other) == []


def test_the_check_of_routers_is_of_the_models_own_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 Liger's layers round otherwise, which gives single tokens other experts."""
    twins.install_plain_kernels(monkeypatch)
    model = tiny_model("mixtral").bfloat16()
    router_loss = make_router_loss(model, DPOConfig(str(tmp_path), use_cpu=True))
    assert router_loss is not None
    use_liger(model, twins.KINDS)
    check_router_loss(router_loss, model)
    assert liger_names(model), "they are there again"


@pytest.mark.parametrize("family", UNKNOWN)
def test_other_families_keep_their_own(family: str) -> None:
    model = tiny_model(family)
    use_liger(model, twins.KINDS)
    assert liger_names(model) == []


def test_the_kinds_of_layers_are_the_packages() -> None:
    import inspect

    from liger_kernel.transformers import monkey_patch

    functions = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.values()
    names = {name for each in functions for name in inspect.signature(each).parameters}
    assert names - {"model", "kwargs"} == {*KINDS, *twins.KINDS}


def test_the_version_is_new_enough() -> None:
    assert _is_here()
    assert metadata.version("liger-kernel") >= OLDEST
