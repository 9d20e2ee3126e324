"""Refuses weights that are stored only as a pickle, with the command that converts them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpofast.errors import ModelError

_MODEL, _ADAPTER = "pytorch_model", "adapter_model"
# `weights_only`, their default in transformers, and given to torch.load, runs no code of the file.
_CONVERT_MODEL = (
    "from transformers import AutoModelForCausalLM as M; f = {source}; "
    'M.from_pretrained(f, dtype="auto", use_safetensors=False{options}).save_pretrained({target})'
)
_CONVERT_TOKENIZER = (
    "; from transformers import AutoTokenizer as T; "
    "T.from_pretrained(f{options}).save_pretrained({target})"
)
_CONVERT_ADAPTER = (
    "import torch; from safetensors.torch import save_file; f = {source}; "
    'w = torch.load(f + ".bin", map_location="cpu", weights_only=True); '
    'save_file({{n: t.contiguous() for n, t in w.items()}}, f + ".safetensors")'
)


def refuse_pickled_weights(name_or_path: str, options: Mapping[str, Any] | None = None) -> None:
    """Raise ModelError if a folder has weights as a pickle, but none as safetensors.

    Args:
        name_or_path: folder or hub name; what isn't a folder is left to `from_pretrained`.
        options: arguments of `from_pretrained`; with use_safetensors false, nothing is refused.
    """
    options = options or {}
    folder = Path(name_or_path).expanduser()
    if not options.get("use_safetensors", True) or not folder.is_dir():
        return
    for stem in (_MODEL, _ADAPTER):
        found = sorted(path.name for path in folder.glob(f"{stem}*.bin*"))
        if not found or any(folder.glob("*.safetensors*")):
            continue
        if stem == _ADAPTER:
            code = _CONVERT_ADAPTER.format(source=_text(folder / stem))
        else:
            # The converted files get into the same folder, beside the tokenizer.
            code = _CONVERT_MODEL.format(source=_text(folder), target="f", options=_given(options))
        raise ModelError(
            f"The model folder {name_or_path!r} has its weights as {found[-1]}, but only "
            f"safetensors are loaded. Convert them, which keeps that file: {_command(code)}"
        )


def refuse_pickled_on_hub(name: str, options: Mapping[str, Any], error: Exception) -> None:
    """Raise ModelError if a model of the hub couldn't be loaded for the same reason.

    Args:
        name: name on the hub.
        options: arguments of `from_pretrained`.
        error: what `from_pretrained` has raised.
    """
    if "cannot be loaded with `safetensors`" not in str(error) or Path(name).is_dir():
        return
    names = {"source": _text(name), "target": _text(name.split("/")[-1])}
    code = (_CONVERT_MODEL + _CONVERT_TOKENIZER).format(**names, options=_given(options))
    raise ModelError(
        f"The model {name!r} has no safetensors on the hub, and only these are loaded. Convert its "
        f"weights, and name the new folder: {_command(code)}"
    ) from error


def _given(options: Mapping[str, Any]) -> str:
    """The options that say which model is loaded, as further arguments in Python."""
    names = ("revision", "variant", "trust_remote_code")
    return "".join(f", {name}={options[name]!r}" for name in names if options.get(name))


def _text(value: str | Path) -> str:
    return json.dumps(str(value), ensure_ascii=False)


def _command(code: str) -> str:
    return shlex.join(["python", "-c", code])
