"""What a reference was made of, in words for people."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

# Options of a model's config that have a line of their own, by the last part of their name.
LOGIT_OPTIONS = {
    "final_logit_softcapping": "capped at {}",
    "logits_soft_cap": "capped at {}",
    "output_logit_soft_cap": "capped at {}",
    "logit_scale": "multiplied by {}",
    "lm_head_multiplier": "multiplied by {}",
    "logits_scaling": "divided by {}",
}
SIZES = {
    "model_type": "{}",
    "num_hidden_layers": "{} layers",
    "hidden_size": "width {}",
    "vocab_size": "vocabulary of {}",
}
ATTENTION_OPTIONS = (
    "attention_multiplier",
    "attn_logit_softcapping",
    "query_pre_attn_scalar",
    "sliding_window",
    "use_sliding_window",
)
POSITION_PARTS = ("rope", "rotary", "max_position_embeddings", "alibi")
LONGEST_VALUE = 60
WIDTH = 96


def reference_words(description: dict[str, Any]) -> list[str]:
    """Lines about a reference's description; what isn't known by name stands in the last ones.

    Whatever the description holds, a terminal is sent printable characters alone.
    """
    rest = {name: value for name, value in flatten(description).items() if value is not None}
    for name in list(rest):
        if name.partition(".")[0] in ("adapter", "tensors"):
            del rest[name]
    autocast = _take(rest, lambda name: name == "autocast_dtype")
    computed_in = f"{shown(autocast[0][1])} autocast" if autocast else "the weights' own dtype"
    versions = [shown(version) for _, version in _take(rest, lambda n: n == "head_version")]
    logits = _listed(rest, LOGIT_OPTIONS) or "as the head gives them"
    lines = {
        "model": _listed(rest, SIZES),
        "weights": _weights(description, rest),
        "adapter": _adapter(description["adapter"]) if "adapter" in description else "",
        "computed in": computed_in if "autocast_dtype" in description else "",
        "attention": _attention(rest),
        "head": f"version {versions[0]} of dpofast's" if versions else "",
        "logits": logits if "config" in description else "",
        "positions": _options(_take(rest, lambda n: any(part in n for part in POSITION_PARTS))),
        "other options": _options(list(rest.items())),
    }
    return [line for name, text in lines.items() if text for line in _wrapped(name, text)]


def flatten(description: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> one dict with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in description.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def printable(text: str) -> str:
    """Control characters and what turns the direction of writing as escapes, the rest as it is."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: Any) -> str:
    """A value of a description, cut where it is long."""
    text = printable(str(value))
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def human_bytes(count: int) -> str:
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.1f} {units[0]}" if units[0] != "B" else f"{count} B"


def _weights(description: dict[str, Any], rest: dict[str, Any]) -> str:
    tensors = description.get("tensors")
    counts = tensors.items() if isinstance(tensors, dict) else ()
    parts = [f"{count} tensors in {printable(str(dtype))}" for dtype, count in counts]
    parts += [f"hash {shown(v)[:12]}" for _, v in _take(rest, lambda name: name == "weights")]
    return ", ".join(parts)


def _adapter(adapter: Any) -> str:
    """Of what `Weights.adapter` says."""
    if adapter is None:
        return "none, or one that changes nothing"
    if not isinstance(adapter, dict):
        return shown(adapter)
    kinds = adapter.get("kinds")
    names = ", ".join(map(str, kinds)) if isinstance(kinds, list) else kinds
    words = f"in {shown(adapter.get('layers'))} layers ({shown(names)})"
    options = adapter.get("options")
    if not isinstance(options, dict):
        return f"plain LoRA {words}"
    given = [(name, value) for name, value in flatten(options).items() if value is not None]
    return f"{words}; {_options(given)}"


def _attention(rest: dict[str, Any]) -> str:
    name = [shown(value) for _, value in _take(rest, lambda name: name == "attention")]
    options = _options(_take(rest, lambda name: _last(name) in ATTENTION_OPTIONS))
    return ", ".join([*name, *filter(None, [options])])


def _options(options: list[tuple[str, Any]]) -> str:
    """Names and values; what all names of a config begin with is left out."""
    names = [name.removeprefix("config.").removeprefix("rope_parameters.") for name, _ in options]
    return ", ".join(
        f"{printable(name)} {shown(value)}" for name, (_, value) in zip(names, options, strict=True)
    )


def _listed(rest: dict[str, Any], words: dict[str, str]) -> str:
    found = dict(_take(rest, lambda name: _last(name) in words))
    by_name = sorted(found, key=lambda name: list(words).index(_last(name)))
    return ", ".join(words[_last(name)].format(shown(found[name])) for name in by_name)


def _take(rest: dict[str, Any], fits: Callable[[str], bool]) -> list[tuple[str, Any]]:
    """Remove from `rest` the options whose name fits."""
    return [(name, rest.pop(name)) for name in list(rest) if fits(name)]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(
        f"{name}: {text}", WIDTH, subsequent_indent="    ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
