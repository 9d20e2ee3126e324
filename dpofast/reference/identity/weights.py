"""The tensors that decide a model's log-probs, hashed one by one without a copy of the model."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from xxhash import xxh3_128

from dpofast.errors import ModelError
from dpofast.reference.identity.options import dtype_name, scoring_options

# Makes the whole of a sharded tensor for the length of a `with` block.
Gather = Callable[[Tensor], AbstractContextManager[Tensor]]

# Copied, cast and hashed at a time. A copy of this size stays in the processor's cache, and the
# next one takes its place; for one of 64 MiB the system would hand out new pages each time.
CHUNK_ELEMENTS = 1 << 20

LORA_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")

# Of an adapter's config, what says where it came from rather than what it does.
ADAPTER_ORIGIN = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "task_type",
)


@dataclass(frozen=True)
class Weights:
    """A model's tensors in short.

    Attributes:
        digest: hexadecimal, of the sorted list of (name, dtype, shape, hash of the bytes).
        tensors: of each dtype, how many; tied ones count under each of their names.
        adapter: of a PEFT adapter that contributes, its kind and options; None without one.
    """

    digest: str
    tensors: dict[str, int]
    adapter: dict[str, Any] | None


def base_model(model: nn.Module) -> Any:
    """The transformers model inside a PeftModel, or the model itself."""
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return model
    if "prompt_encoder" in model._modules:
        raise ModelError(
            "An adapter that adds tokens to the prompt can't be the reference; use LoRA, or merge "
            "the adapter into the model."
        )
    return model.get_base_model()  # type: ignore[operator]


def read_weights(
    model: nn.Module, scoring_dtype: torch.dtype | None, gather: Gather | None
) -> Weights:
    """Hash whatever decides the log-probs of `model`; arguments as of `model_identity`."""
    reader = _Reader(scoring_dtype, gather)
    reader.module(base_model(model), "")
    adapter = None
    if reader.adapters:
        kinds = sorted({type(layer).__name__ for layer, _ in reader.adapters})
        adapter = {"layers": len(reader.adapters), "kinds": kinds}
        if not all(_is_plain_lora(layer, name) for layer, name in reader.adapters):
            adapter["options"] = _adapter_options(model, {name for _, name in reader.adapters})
    return Weights(
        hashlib.sha256("\n".join(sorted(reader.lines)).encode()).hexdigest(),
        dict(sorted(reader.dtypes.items())),
        adapter,
    )


class _Reader:
    """Walks through a model's modules; PEFT's wrappers are known by what they hold."""

    def __init__(self, scoring_dtype: torch.dtype | None, gather: Gather | None) -> None:
        self.scoring_dtype = scoring_dtype
        self.gather = gather
        self.lines: list[str] = []  # one for each named tensor
        self.dtypes: Counter[str] = Counter()
        self.adapters: list[tuple[nn.Module, str]] = []  # that contribute: layer, adapter
        self._hashed: dict[int, tuple[str, str]] = {}  # tied tensors are read once

    def module(self, module: nn.Module, prefix: str) -> None:
        """Read a module and what it holds; `prefix` ends with a dot, or is empty."""
        children = module._modules
        if "base_layer" in children and hasattr(module, "adapter_layer_names"):
            self.module(module.get_submodule("base_layer"), prefix)
            self._adapter_layer(module, prefix)
        elif "modules_to_save" in children and "original_module" in children:
            self.module(_module_in_use(module), prefix)
        elif "token_adapter" in children and "original_module" in children:
            self.module(module.get_submodule("original_module"), prefix)
            self._adapter_layer(module.get_submodule("token_adapter"), prefix)
        else:
            for name, tensor in _own_tensors(module):
                self._line(prefix + name, tensor)
            # Its numbers follow from the config. But `model.bfloat16()` rounds them, where loading
            # in bfloat16 leaves rotary frequencies in float32: these are two references.
            for name, buffer in module._buffers.items():
                if name in module._non_persistent_buffers_set and _is_rounded(buffer):
                    self.lines.append(f"{prefix}{name} {dtype_name(buffer.dtype)} not saved")
            for name, child in children.items():
                if child is not None:
                    self.module(child, f"{prefix}{name}.")

    def _adapter_layer(self, layer: Any, prefix: str) -> None:
        """What a PEFT layer adds to the layer below it."""
        if layer.disable_adapters or layer.merged:
            if layer.disable_adapters and layer.merged:
                raise ModelError(
                    f"{prefix.rstrip('.')}: its adapter is merged into the weights and switched "
                    "off at once, so its next forward would change them; unmerge it first."
                )
            return
        for index, adapter in enumerate(layer.active_adapters):
            tensors = {
                name: tensor
                for name, tensor in _tensors_below(layer, skip="base_layer")
                if adapter in name.split(".")
            }
            if not tensors or self._contributes_nothing(layer, adapter, tensors):
                continue
            self.adapters.append((layer, adapter))
            # an adapter's own name changes nothing; a layer may be wrapped for several parameters
            label = f"{prefix}{getattr(layer, 'parameter_name', '')}:adapter{index}"
            for name, tensor in tensors.items():
                kind = ".".join(part for part in name.split(".") if part != adapter)
                self._line(f"{label}.{kind}", tensor)
            scaling = getattr(layer, "scaling", None)
            if isinstance(scaling, dict):
                self.lines.append(f"{label}.scaling = {scaling.get(adapter)!r}")

    def _contributes_nothing(self, layer: Any, adapter: str, tensors: dict[str, Tensor]) -> bool:
        """LoRA adds B (A x) + bias: nothing while A or B is zero, as in a fresh adapter."""
        if not _is_plain_lora(layer, adapter):
            return False
        groups: dict[str, list[Tensor]] = {"A": [], "B": [], "bias": []}
        for name, tensor in tensors.items():
            factor = name.split(".")[0]
            if factor not in LORA_FACTORS:
                return False
            groups["bias" if name.endswith(".bias") else factor[-1]].append(tensor)
        moves = {group: any(map(self._any_nonzero, held)) for group, held in groups.items()}
        return not moves["bias"] and not (moves["A"] and moves["B"])

    def _any_nonzero(self, tensor: Tensor) -> bool:
        with self._whole(tensor, "an adapter's tensor") as whole:
            return bool(whole.any())

    def _line(self, name: str, tensor: Tensor) -> None:
        if id(tensor) not in self._hashed:
            with self._whole(tensor, name) as whole:
                self._hashed[id(tensor)] = self._fingerprint(whole)
        dtype, fingerprint = self._hashed[id(tensor)]
        self.lines.append(f"{name} {dtype} {fingerprint}")
        self.dtypes[dtype] += 1

    def _fingerprint(self, tensor: Tensor) -> tuple[str, str]:
        """Dtype, and shape with the XXH3-128 of the bytes in row-major order."""
        dtype = tensor.dtype
        if self.scoring_dtype is not None and tensor.is_floating_point():
            dtype = self.scoring_dtype
        flat = tensor.detach().reshape(-1)
        hasher = xxh3_128()
        for start in range(0, flat.numel(), CHUNK_ELEMENTS):
            chunk = flat[start : start + CHUNK_ELEMENTS].to("cpu", dtype).contiguous()
            hasher.update(chunk.view(torch.uint8).numpy().data)
        return dtype_name(dtype), f"{list(tensor.shape)} {hasher.hexdigest()}"

    def _whole(self, tensor: Tensor, name: str) -> Any:
        """A context with all of a tensor in it: the place where shards are put together."""
        if self.gather is not None:
            return self.gather(tensor)
        if tensor.is_meta or hasattr(tensor, "ds_id") or hasattr(tensor, "full_tensor"):
            raise ModelError(
                f"{name} is not whole in this process (sharded or not loaded), so the reference "
                "can't be identified; load the model unsharded, or pass `gather`."
            )
        return nullcontext(tensor)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers; the others follow from the config."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield name, tensor


def _is_rounded(buffer: Tensor | None) -> TypeGuard[Tensor]:
    """Whether floats aren't in the dtype that models make them in."""
    return buffer is not None and buffer.is_floating_point() and buffer.dtype != torch.float32


def _tensors_below(module: nn.Module, skip: str) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a module, buffers that aren't saved included, but for one child's."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor
    for child_name, child in module._modules.items():
        if child is not None and child_name != skip:
            for name, tensor in _tensors_below(child, skip):
                yield f"{child_name}.{name}", tensor


def _module_in_use(wrapper: Any) -> Any:
    """What PEFT's `modules_to_save` calls: its copy, or the original while switched off."""
    active = [] if wrapper.disable_adapters else wrapper.active_adapters
    if active and active[0] in wrapper.modules_to_save:
        return wrapper.modules_to_save[active[0]]
    return wrapper.original_module


def _is_plain_lora(layer: Any, adapter: str) -> bool:
    """LoRA as in its paper; DoRA and other variants keep a mark on the layer."""
    marks = (getattr(layer, "lora_variant", {}), getattr(layer, "use_dora", {}))
    return hasattr(layer, "lora_B") and not any(mark.get(adapter) for mark in marks)


def _adapter_options(model: Any, adapters: set[str]) -> dict[str, Any]:
    options = {}
    for adapter in sorted(adapters):
        known = scoring_options(model.peft_config[adapter].to_dict())
        kept = {name: value for name, value in known.items() if name not in ADAPTER_ORIGIN}
        # PEFT keeps names in sets, whose order is an accident
        options[adapter] = {
            name: sorted(value) if isinstance(value, set) else value for name, value in kept.items()
        }
    return options
