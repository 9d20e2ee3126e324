"""Every causal LM of transformers is packed, padded or refused, and refused with its reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, BertGenerationConfig, BertGenerationDecoder
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dpofast.errors import ModelError
from dpofast.model.kind import refuse_stored_kind
from dpofast.model.model_types import ENCODERS, NOT_PACKABLE, PACKABLE, REFUSED, why_refused
from dpofast.model.packable import why_not_packed
from tests.family_sizes import SIZES
from tests.model_types import (
    ALIASES,
    PAGE,
    TRAINABLE,
    trained_with,
    type_when_loaded,
    with_tables,
)

LISTS = {"packed": PACKABLE, "padded": NOT_PACKABLE, "refused": REFUSED, "encoders": ENCODERS}
ROOT = Path(__file__).parents[2]


def pinned() -> Version:
    """The version of transformers that the lists were made with."""
    found = re.search(r"^transformers==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found
    return Version(found[1])


def test_every_causal_lm_of_transformers_is_in_one_list():
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        model_type = type_when_loaded(name)
        places = [place for place, types in LISTS.items() if model_type in types]
        assert len(places) == 1, f"{name} is in {places}: look at it, and list it in model_types.py"


def test_every_listed_type_exists():
    if Version(transformers.__version__) < pinned():
        pytest.skip("an older transformers has fewer types")
    known = {type_when_loaded(name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    # types of a part of a stored model
    known |= {"musicgen_decoder", "musicgen_melody_decoder", "emu3_text_model", "mllama_text_model"}
    for place, types in LISTS.items():
        assert not {*types} - known, f"transformers has no such model types any more: {place}"


def test_an_alias_is_the_type_of_a_text_config_that_the_class_takes():
    for name, expected in ALIASES.items():
        if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            continue
        config = CONFIG_MAPPING[name]
        if config.model_type == name:
            model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])
            config = config.sub_configs["text_config"]
            assert model_class.config_class is config
        assert config.model_type == expected


@pytest.mark.parametrize(
    "model_type", ["bart", "emu3", "mllama", "xlnet", "reformer", "bert", "bert-generation"]
)
def test_a_refused_type_is_refused_by_its_config(tmp_path, model_type):
    stored = {"model_type": model_type, "is_encoder_decoder": False}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    reason = REFUSED.get(model_type, "an encoder, which isn't causal unless")
    with pytest.raises(ModelError, match=f"is {reason}.*DPO trains causal language models"):
        refuse_stored_kind(str(tmp_path))


def test_an_encoder_that_is_a_decoder_runs_padded():
    assert all(why_refused(SimpleNamespace(model_type=each)) for each in {*REFUSED, *ENCODERS})
    sizes = {**SIZES, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = BertGenerationConfig(**sizes, is_decoder=True)
    assert why_refused(config) is None
    assert why_not_packed(BertGenerationDecoder(config)) == (
        "it is an encoder, and hasn't been compared as a decoder"
    )


def test_the_table_of_all_model_types_is_that_of_the_lists():
    """`python -m tests.trained_families` writes it; what was trained, only a run of it can say."""
    page = PAGE.read_text(encoding="utf-8")
    trained = trained_with(page)
    assert sorted(trained) == sorted(TRAINABLE), "train the types that are new"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in trained.values())
    if Version(transformers.__version__) != pinned():
        pytest.skip("another transformers can call other packages")
    assert page == with_tables(page, trained)
