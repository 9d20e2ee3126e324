"""What the tests know about model types, and their table: `python -m tests.model_types`."""

from __future__ import annotations

from collections.abc import Iterable

from dpofast.model.model_types import ENCODERS, NOT_PACKABLE, PACKABLE, REFUSED

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


def type_when_loaded(name: str) -> str:
    """The model type of the causal LM that transformers loads for a name."""
    return ALIASES.get(name, name)


def table_lines() -> list[str]:
    """The lines of docs/packing.md's table of all model types."""
    encoders = (
        "encoders, which aren't causal; with `is_decoder: true` in their config, they run padded"
    )
    return [
        "| model types | layout | why |",
        "|---|---|---|",
        _row(PACKABLE, "packed", "hidden states and gradients compared in float64"),
        *_rows(NOT_PACKABLE, "padded"),
        *_rows(REFUSED, "refused"),
        _row(ENCODERS, "refused", encoders),
    ]


def _rows(reasons: dict[str, str], layout: str) -> list[str]:
    types_of: dict[str, list[str]] = {}
    for model_type, reason in reasons.items():
        types_of.setdefault(reason, []).append(model_type)
    return [_row(types, layout, reason) for reason, types in types_of.items()]


def _row(types: Iterable[str], layout: str, why: str) -> str:
    return f"| {', '.join(f'`{each}`' for each in sorted(types))} | {layout} | {why} |"


if __name__ == "__main__":
    print("\n".join(table_lines()))
