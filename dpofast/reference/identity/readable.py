"""Writes the description of a reference as lines for people, and compares two descriptions."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

from dpofast.reference.identity.options import (
    LOGIT_DIVISORS,
    LOGIT_MULTIPLIERS,
    MULTIPLY_BY_DIVISORS,
    SOFTCAP_OPTIONS,
)

# Config options that have a line of their own, by the last part of their dotted name. A dict gives
# the phrase for each option's value.
LOGIT_PHRASES = {
    **dict.fromkeys(SOFTCAP_OPTIONS, "capped at {}"),
    **dict.fromkeys(LOGIT_MULTIPLIERS, "multiplied by {}"),
    **dict.fromkeys(LOGIT_DIVISORS, "divided by {}"),
}
SIZE_PHRASES = {
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
LONGEST_VALUE = 60  # characters of a value
LONGEST_TEXT = 200  # characters of a value that is a sentence
WIDTH = 96  # characters of a line


def readable_lines(description: dict[str, Any]) -> list[str]:
    """Describe a reference in lines for people.

    Options without a line of their own are listed in the last lines. All characters are printable,
    whatever the description contains, because it may come from a stranger's store.
    """
    # Each line below takes its options out of `rest`, in this order; the last shows what is left.
    rest = {name: value for name, value in flatten(description).items() if value is not None}
    for name in list(rest):
        if name.partition(".")[0] in ("adapter", "tensors"):
            del rest[name]  # shown by _weights and _adapter, from the nested description
    autocast = _take(rest, lambda name: name == "autocast_dtype")
    computed_in = f"{shorten(autocast[0][1])} autocast" if autocast else "the weights' own dtype"
    versions = [shorten(version) for _, version in _take(rest, lambda n: n == "head_version")]
    logits = _phrased(rest, _logit_phrases(description)) or "as the head gives them"
    lines = {
        "model": _phrased(rest, SIZE_PHRASES),
        "weights": _weights(description, rest),
        "adapter": _adapter(description["adapter"]) if "adapter" in description else "",
        "quantised": _listed(rest.pop("quantised", None)),
        "computed in": computed_in if "autocast_dtype" in description else "",
        "attention": _attention(rest),
        "layers": _listed(rest.pop("layers", None)),
        "head": f"version {versions[0]} of dpofast's" if versions else "",
        "logits": logits if "config" in description else "",
        "positions": _options(_take(rest, lambda n: any(part in n for part in POSITION_PARTS))),
        "other options": _options(list(rest.items())),
    }
    return [line for name, text in lines.items() if text for line in _wrapped(name, text)]


def _logit_phrases(description: dict[str, Any]) -> dict[str, str]:
    """The phrases for what the described model's type does to its logits."""
    config = description.get("config")
    if isinstance(config, dict) and str(config.get("model_type")) in MULTIPLY_BY_DIVISORS:
        return {**LOGIT_PHRASES, **dict.fromkeys(LOGIT_DIVISORS, "multiplied by {}")}
    return LOGIT_PHRASES


def flatten(description: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested dicts into one dict with dotted names; `prefix` begins each name."""
    flat: dict[str, Any] = {}
    for name, value in description.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def printable(text: str) -> str:
    """Replace every character that isn't printable with its escape sequence.

    Control characters could take over the terminal, and direction marks could reorder the line.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(value: Any) -> str:
    """Write a value of a description in at most LONGEST_VALUE printable characters."""
    text = printable(str(value))
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def differences(wanted: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """Compare two descriptions.

    Args:
        wanted: description of the run's reference ("here").
        stored: description of a reference in the store ("there").

    Returns:
        A phrase for each option that differs, sorted by the option's dotted name.
    """
    ours, theirs = flatten(wanted), flatten(stored)
    lines = []
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs or ours[name] != theirs[name]:
            there, here = shorten(theirs.get(name, "-")), shorten(ours.get(name, "-"))
            lines.append(f"{printable(name)}: {there} there, {here} here")
    return lines


def _weights(description: dict[str, Any], rest: dict[str, Any]) -> str:
    """Write how many tensors there are of each dtype, and how their hash begins."""
    tensors = description.get("tensors")
    counts = tensors.items() if isinstance(tensors, dict) else ()
    parts = [f"{count} tensors in {printable(str(dtype))}" for dtype, count in counts]
    parts += [f"hash {shorten(v)[:12]}" for _, v in _take(rest, lambda name: name == "weights")]
    return ", ".join(parts)


def _listed(values: Any) -> str:
    """Write a list of texts in one line."""
    if not isinstance(values, list):
        return ""
    return "; ".join(printable(str(value))[:LONGEST_TEXT] for value in values)


def _adapter(adapter: Any) -> str:
    """Describe an adapter as `Weights.adapter` records it."""
    if adapter is None:
        return "none, or one that changes nothing"
    if not isinstance(adapter, dict):
        return shorten(adapter)
    kinds = adapter.get("kinds")
    names = ", ".join(map(str, kinds)) if isinstance(kinds, list) else kinds
    place = f"in {shorten(adapter.get('layers'))} layers ({shorten(names)})"
    options = adapter.get("options")
    if not isinstance(options, dict):
        return f"plain LoRA {place}"
    given = [(name, value) for name, value in flatten(options).items() if value is not None]
    return f"{place}; {_options(given)}"


def _attention(rest: dict[str, Any]) -> str:
    """Name the attention implementation, followed by the options that change attention."""
    name = [shorten(value) for _, value in _take(rest, lambda name: name == "attention")]
    options = _options(_take(rest, lambda name: _last(name) in ATTENTION_OPTIONS))
    return ", ".join([*name, *filter(None, [options])])


def _options(options: list[tuple[str, Any]]) -> str:
    """List names and values, without the prefixes that say only where an option was found."""
    names = [name.removeprefix("config.").removeprefix("rope_parameters.") for name, _ in options]
    return ", ".join(
        f"{printable(name)} {shorten(value)}"
        for name, (_, value) in zip(names, options, strict=True)
    )


def _phrased(rest: dict[str, Any], phrases: dict[str, str]) -> str:
    """Take the options that have a phrase out of `rest`, and write them in the phrases' order."""
    found = dict(_take(rest, lambda name: _last(name) in phrases))
    by_name = sorted(found, key=lambda name: list(phrases).index(_last(name)))
    return ", ".join(phrases[_last(name)].format(shorten(found[name])) for name in by_name)


def _take(rest: dict[str, Any], fits: Callable[[str], bool]) -> list[tuple[str, Any]]:
    """Remove the options whose name fits from `rest`, and return them."""
    return [(name, rest.pop(name)) for name in list(rest) if fits(name)]


def _last(name: str) -> str:
    """Return the last part of a dotted name."""
    return name.rpartition(".")[2]


def _wrapped(name: str, text: str) -> list[str]:
    """Write one entry, "name: text", on as many lines as it needs; later lines are indented."""
    return textwrap.wrap(
        f"{name}: {text}", WIDTH, subsequent_indent="    ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
