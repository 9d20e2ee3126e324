"""What the tests know about model types, and their tables in docs/model-types.md."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import transformers
from transformers.models.auto.configuration_auto import model_type_to_module_name

from dpofast.model.model_types import ENCODERS, NOT_PACKABLE, PACKABLE, REFUSED

PAGE = Path(__file__).parents[1] / "docs" / "model-types.md"
# Names in transformers' list of causal LMs that aren't the type of a loaded model. Their configs
# hold a text config, and the model that is loaded is of its type; or they are another name of a
# type's config.
ALIASES = {
    "dots3_note": "dots3_note_text",
    "gpt-sw3": "gpt2",
    "llama4": "llama4_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen4_exp": "qwen4_exp_text",
}
TRAINABLE = PACKABLE | NOT_PACKABLE.keys() | ENCODERS
_HEADER = "| model type | layout | why it is padded | faster on a GPU with | trained with |"
_REFUSED_HEADER = "| model types | why they are refused |"
_DECODER = "an encoder, which is refused unless its config says `is_decoder: true`"
# What transformers' modelling files call kernels' packages.
_PACKAGES = {
    '"fla"': "flash-linear-attention",
    '"causal_conv1d"': "causal-conv1d",
    '"mamba_ssm"': "mamba-ssm",
    "from xlstm": "xlstm",
    "is_ninja_available": "ninja",
}


def type_when_loaded(name: str) -> str:
    """The model type of the causal LM that transformers loads for a name."""
    return ALIASES.get(name, name)


def gpu_packages(model_type: str) -> list[str]:
    """Packages whose kernels transformers calls in this type's layers, if they are installed."""
    module = model_type_to_module_name(model_type)
    folder = Path(transformers.__file__).parent / "models" / module
    # Types that are another one's class under their own name have no file `modeling_...`.
    source = "".join(path.read_text(encoding="utf-8") for path in folder.glob(f"mod*_{module}.py"))
    return list(dict.fromkeys(package for word, package in _PACKAGES.items() if word in source))


def with_tables(page: str, trained: Mapping[str, str]) -> str:
    """The page with the tables of the lists.

    Args:
        page: docs/model-types.md.
        trained: by model type, the version of transformers with which it was last trained.
    """
    lines = [_HEADER, "|---|---|---|---|---|"]
    lines += [_trainable_row(each, trained.get(each, "")) for each in sorted(TRAINABLE)]
    page = _with_table(page, _HEADER, lines)
    lines = [_REFUSED_HEADER, "|---|---|"]
    types_of: dict[str, list[str]] = {}
    for model_type, reason in REFUSED.items():
        types_of.setdefault(reason, []).append(model_type)
    lines += [f"| {_names(types)} | {reason} |" for reason, types in types_of.items()]
    return _with_table(page, _REFUSED_HEADER, lines)


def trained_with(page: str) -> dict[str, str]:
    """By model type, the version of transformers with which the page says that it was trained."""
    return dict(re.findall(r"^\| `([^`]+)` \|.*\| (\S+) \|$", page, re.MULTILINE))


def _trainable_row(model_type: str, version: str) -> str:
    layout = "packed" if model_type in PACKABLE else "padded"
    why = _DECODER if model_type in ENCODERS else NOT_PACKABLE.get(model_type, "")
    packages = ", ".join(gpu_packages(model_type))
    return f"| `{model_type}` | {layout} | {why} | {packages} | {version} |"


def _names(types: Iterable[str]) -> str:
    return ", ".join(f"`{each}`" for each in sorted(types))


def _with_table(page: str, header: str, lines: list[str]) -> str:
    """The page with other lines in place of the table that begins with a header."""
    table = re.compile(f"^{re.escape(header)}$(\n\\|.*)*", re.MULTILINE)
    return table.sub(lambda _: "\n".join(lines), page)
