"""Models that aren't causal LMs are refused with their kind, as objects and by their folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    BertGenerationConfig,
    BertGenerationEncoder,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from dpofast.errors import ModelError
from dpofast.model.kind import check_kind, refuse_stored_kind
from dpofast.model.load import load_policy, load_skeleton
from tests.support import TINY_FIELDS, make_trainer, tiny_llama

BERT = {**TINY_FIELDS, "num_hidden_layers": 1}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
LLAMA = {**TINY_FIELDS, "num_hidden_layers": 1, "pad_token_id": 0}
OTHERS = {
    "encoder-decoder": lambda: T5ForConditionalGeneration(T5Config(**T5)),
    "classifier, such as a reward": lambda: LlamaForSequenceClassification(LlamaConfig(**LLAMA)),
    "masked language model": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "model without a language modelling head": lambda: LlamaModel(LlamaConfig(**LLAMA)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_the_kind_is_named(tmp_path: Path, kind: str) -> None:
    model = OTHERS[kind]()
    model.save_pretrained(tmp_path)
    sentence = f"is an? {kind}.*DPO trains causal language models"
    with pytest.raises(ModelError, match=f"{type(model).__name__} {sentence}"):
        check_kind(model)
    for load in (refuse_stored_kind, load_policy, load_skeleton):
        with pytest.raises(ModelError, match=f"{tmp_path.name}' {sentence}"):
            load(str(tmp_path))


def test_a_head_that_would_be_random_is_refused_when_the_config_does_not_tell(
    tmp_path: Path,
) -> None:
    encoder = BertGenerationEncoder(BertGenerationConfig(**BERT, is_decoder=True))
    encoder.save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match=r"no language modelling head: lm_head\.bias"):
        load_policy(str(tmp_path / "bert"))
    LlamaModel(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "llama")
    config = AutoConfig.from_pretrained(tmp_path / "llama")
    config.architectures = None
    config.save_pretrained(tmp_path / "llama")
    with pytest.raises(ModelError, match=r"head: lm_head\.weight would be random"):
        load_policy(str(tmp_path / "llama"))


def test_causal_models_are_taken(tmp_path: Path) -> None:
    models: list[Any] = [tiny_llama(), GPT2LMHeadModel(GPT2Config(**GPT2))]
    # The head of GPT-2 is its embedding, so its body has all weights.
    for model in [*models, GPT2Model(GPT2Config(**GPT2))]:
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        check_kind(load_policy(str(folder)))
        load_skeleton(str(folder))


@pytest.mark.parametrize("argument", ["model", "ref_model"])
def test_a_trainer_refuses_before_it_reads_a_pair(tmp_path: Path, argument: str) -> None:
    class Unread(list[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("the pairs were read")

    other = T5ForConditionalGeneration(T5Config(**T5))
    other.save_pretrained(tmp_path / "t5")
    for given in (other, str(tmp_path / "t5")):
        for more in ({}, {"data_collator": list}, {"nonsense": 1}, {"loss_type": "kto_pair"}):
            with pytest.raises(ModelError, match="encoder-decoder"):
                make_trainer(tmp_path, pairs=Unread([1]), **{argument: given}, **more)


def test_a_type_without_a_causal_model_is_refused_in_one_sentence(tmp_path: Path) -> None:
    T5Config(**T5, is_encoder_decoder=False, architectures=["T5EncoderModel"]).save_pretrained(
        tmp_path
    )
    for load in (load_policy, load_skeleton):
        with pytest.raises(ModelError) as caught:
            load(str(tmp_path))
        assert str(caught.value) == (
            f"The model {str(tmp_path)!r} can't be loaded, as transformers has no causal language "
            "model with a T5Config. DPO trains causal language models (a class such as "
            "LlamaForCausalLM); name one."
        )


def test_code_that_comes_with_a_model_is_not_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": code}))
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "n")
    refuse_stored_kind(str(tmp_path))
    assert not asked
