"""Where a model was loaded from, so that it can be loaded again."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers.utils import CONFIG_NAME

from dpofast.model.load import load_policy
from dpofast.model.parts import causal_lm
from dpofast.model.quantised import quantised_layers
from dpofast.options.config import DPOConfig
from dpofast.options.quantisation import OPTION
from dpofast.reference.identity.description import ReferenceIdentity


@dataclass(frozen=True)
class Origin:
    """Where a model was loaded from, and how.

    Attributes:
        name: the model's folder as an absolute path, or its hub name; empty if it has none, as a
            model that was built from a config.
        revision: commit on the hub; None for a folder.
        config: the model's config, with all that was changed after it was read.
        options: further arguments of `from_pretrained`.
    """

    name: str
    revision: str | None
    config: Any = field(repr=False, compare=False)
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, config: DPOConfig) -> Origin:
        """The origin of a causal LM; that of the model below the adapter for a PeftModel.

        Args:
            model: the policy before step 1.
            config: options of the run; they say how a model that was given by name was loaded.
        """
        own = causal_lm(model).config
        name = str(getattr(own, "_name_or_path", "") or "")
        if name and Path(name).expanduser().is_dir():
            name = str(Path(name).expanduser().resolve())  # the working folder may change
        given = config.loading_options()
        revision = given.pop("revision", None)
        commit = getattr(own, "_commit_hash", None)  # only of older versions of transformers
        commit = commit or _cached_commit(name, revision, given.get("cache_dir"))
        # Options of the config are in the model's config already, which is loaded with.
        options = {key: value for key, value in given.items() if not hasattr(own, key)}
        kept = copy.deepcopy(own)
        quantizer: Any = getattr(causal_lm(model), "hf_quantizer", None)
        was_quantised = quantizer is not None and hasattr(kept, OPTION)
        if was_quantised and not quantizer.pre_quantized:
            # transformers takes the files of a config with this entry for quantised ones.
            options[OPTION] = kept.quantization_config
            del kept.quantization_config
        return cls(name, commit or revision, kept, options)

    def moved_to(self, name: str, revision: str | None) -> Origin:
        """The origin that a checkpoint names. No code that comes with that model is run."""
        if name == self.name:
            return replace(self, revision=revision)
        return replace(
            self, name=name, revision=revision, options={**self.options, "trust_remote_code": False}
        )

    def load(self, identity: ReferenceIdentity, dtype: torch.dtype | None = None) -> Any:
        """Load the model again, as the reference that it was.

        Args:
            identity: identity of the reference, from which the dtype and the attention are known.
            dtype: dtype to load in, before the model is cast to that of the reference; None to load
                in the reference's own.

        Raises:
            ModelError: the model can't be loaded.
        """
        scored_in = _dtype(identity)
        options = {
            **self.options,
            "dtype": dtype or scored_in,
            "attn_implementation": identity.description["attention"],
            "config": copy.deepcopy(self.config),
        }
        if self.revision is not None:
            options["revision"] = self.revision
        with torch.random.fork_rng(devices=[]):  # training goes on with the same random numbers
            model = load_policy(self.name, **options)
        # A quantised model can't be cast; it is only loaded in the dtype that it came from.
        return model if dtype is None or quantised_layers(model) else model.to(scored_in)

    def dtypes(self, identity: ReferenceIdentity) -> list[torch.dtype | None]:
        """The values of `dtype` in `load` that can give the reference, the likeliest first.

        A model that was cast after it was loaded has other roundings than one that was loaded in
        its present dtype, also in buffers that aren't saved. Its config still has the dtype that it
        was loaded in.
        """
        scored_in = _dtype(identity)
        first = getattr(self.config, "dtype", None)
        if not isinstance(first, torch.dtype) or first == scored_in == torch.float32:
            return [None]
        return [None, first]


def _cached_commit(name: str, revision: str | None, cache_dir: Any) -> str | None:
    """The commit of a hub model that a branch names, as the cache on this machine has it."""
    if not name or Path(name).is_dir():
        return None
    try:
        path = try_to_load_from_cache(name, CONFIG_NAME, cache_dir=cache_dir, revision=revision)
    except HFValidationError:  # no name that the hub could have
        return None
    # hub/models--OWNER--NAME/snapshots/COMMIT/config.json
    return Path(path).parent.name if isinstance(path, str) else None


def _dtype(identity: ReferenceIdentity) -> torch.dtype:
    """The floating-point dtype that most of the reference's tensors have."""
    counts = identity.description["tensors"]
    dtypes = {getattr(torch, name): count for name, count in counts.items()}
    floating = {dtype: count for dtype, count in dtypes.items() if dtype.is_floating_point}
    return max(floating, key=lambda dtype: floating[dtype], default=torch.float32)
