"""Hashes the tensors that determine a model's log-probs, one at a time and without a copy."""

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
from dpofast.reference.identity.options import scoring_options
from dpofast.reference.identity.quantised import (
    QuantisedWeight,
    dtype_name,
    four_bit_state,
    is_quantised,
    quantised_weight,
    rounded_bias,
)

# Makes a sharded tensor whole inside a `with` block.
Gather = Callable[[Tensor], AbstractContextManager[Tensor]]

# Elements that are copied, cast and hashed at a time. A copy of this size fits into the processor's
# cache, and the next copy reuses its memory; a copy of 64 MiB would get new pages each time.
CHUNK_ELEMENTS = 1 << 20

LORA_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")

# Adapter options that say where an adapter came from, not what it does.
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
    """Summary of a model's tensors.

    Attributes:
        digest: SHA-256 in hexadecimal over the sorted lines "name dtype shape hash-of-the-bytes".
        tensors: number of tensors of each dtype; a tied tensor counts once under each of its names.
        adapter: kinds and options of the PEFT adapters that contribute; None if none does.
        quantised: how weights are quantised, each with their number; empty if none is.
    """

    digest: str
    tensors: dict[str, int]
    adapter: dict[str, Any] | None
    quantised: list[str]


def base_model(model: nn.Module) -> Any:
    """Return the transformers model inside a PeftModel, or the model itself.

    Raises:
        ModelError: the adapter adds tokens to the prompt.
    """
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return model
    if "prompt_encoder" in model._modules:
        raise ModelError(
            "An adapter that adds tokens to the prompt can't be the reference; use LoRA, or merge "
            "the adapter into the model."
        )
    return model.get_base_model()  # type: ignore[operator]


def read_weights(
    model: nn.Module,
    scoring_dtype: torch.dtype | None,
    gather: Gather | None,
    autocast_dtype: torch.dtype | None = None,
) -> Weights:
    """Hash every tensor that determines the log-probs of `model`.

    Args:
        model: transformers model, or a PeftModel around one.
        scoring_dtype: see `model_identity`.
        gather: see `model_identity`.
        autocast_dtype: see `model_identity`; only quantised layers need it.

    Raises:
        ModelError: a tensor isn't whole in this process and `gather` is None, or an adapter or a
            quantised weight can't be identified.
    """
    reader = _Reader(scoring_dtype, gather, autocast_dtype)
    reader.read_module(base_model(model), "")
    adapter = None
    if reader.adapters:
        kinds = sorted({type(layer).__name__ for layer, _ in reader.adapters})
        adapter = {"layers": len(reader.adapters), "kinds": kinds}
        # The tensors and the scaling say all about plain LoRA; other kinds depend on more options.
        if not all(_is_plain_lora(layer, name) for layer, name in reader.adapters):
            adapter["options"] = _adapter_options(model, {name for _, name in reader.adapters})
    return Weights(
        hashlib.sha256("\n".join(sorted(reader.lines)).encode()).hexdigest(),
        dict(sorted(reader.dtypes.items())),
        adapter,
        [f"{count} of {kind}" for kind, count in sorted(reader.quantised.items())],
    )


class _Reader:
    """Walks through a model's modules and collects a line for each tensor.

    PEFT's wrappers are recognised by their attributes, so that PEFT needn't be installed.

    Attributes:
        lines: one line for each named tensor, for each rounded buffer and for each scaling factor.
        dtypes: number of tensors of each dtype.
        adapters: layer and adapter name of each adapter that contributes.
        quantised: number of weights that are quantised in each way.
    """

    def __init__(
        self,
        scoring_dtype: torch.dtype | None,
        gather: Gather | None,
        autocast_dtype: torch.dtype | None,
    ) -> None:
        self.scoring_dtype = scoring_dtype
        self.gather = gather
        self.autocast_dtype = autocast_dtype
        self.quantised: Counter[str] = Counter()
        self.lines: list[str] = []
        self.dtypes: Counter[str] = Counter()
        self.adapters: list[tuple[nn.Module, str]] = []
        # Dtype and fingerprint by the tensor's id, so that tied tensors are read only once.
        self._hashed: dict[int, tuple[str, str]] = {}

    def read_module(self, module: nn.Module, prefix: str) -> None:
        """Read a module and all modules in it.

        Args:
            module: part of the model, or all of it.
            prefix: its name in the model with a dot at the end; empty for the whole model.
        """
        children = module._modules
        # The first three cases are PEFT's wrappers: an adapter around a layer, a trained copy of a
        # module, and trained rows of an embedding. They pass `prefix` on unchanged, so that a
        # wrapped tensor keeps the name that it has in the base model.
        if "base_layer" in children and hasattr(module, "adapter_layer_names"):
            self.read_module(module.get_submodule("base_layer"), prefix)
            self._read_adapters(module, prefix)
        elif "modules_to_save" in children and "original_module" in children:
            self.read_module(_module_in_use(module), prefix)
        elif "token_adapter" in children and "original_module" in children:
            self.read_module(module.get_submodule("original_module"), prefix)
            self._read_adapters(module.get_submodule("token_adapter"), prefix)
        else:
            own = dict(_own_tensors(module))
            self._read_quantised(module, prefix, own)
            for name, tensor in own.items():
                self._add_line(prefix + name, tensor)
            # The values of an unsaved buffer follow from the config, so only its dtype counts:
            # `model.bfloat16()` rounds rotary frequencies, whereas loading a model in bfloat16
            # leaves them in float32. These are two different references.
            for name, buffer in module._buffers.items():
                if name in module._non_persistent_buffers_set and _is_rounded(buffer):
                    self.lines.append(f"{prefix}{name} {dtype_name(buffer.dtype)} not saved")
            for name, child in children.items():
                if child is not None:
                    self.read_module(child, f"{prefix}{name}.")

    def _read_quantised(self, module: Any, prefix: str, own: dict[str, Tensor]) -> None:
        """Read what bitsandbytes has quantised of a layer, and take it out of `own`."""
        names = [name for name, tensor in own.items() if is_quantised(tensor)]
        for name in names:
            label, tensor = prefix + name, own.pop(name)
            with self._whole(tensor, label) as whole:
                weight = quantised_weight(module, whole, label)
                self._add_parts(label, weight)
            self.quantised[weight.kind] += 1
            self.dtypes[dtype_name(weight.parts[""].dtype)] += 1
        if names and "bias" in own:
            bias = rounded_bias(module, own.pop("bias"), self.autocast_dtype)
            self._add_parts(f"{prefix}bias", QuantisedWeight("bias", "", {"": bias}))
        # Other weights than a Linear's, such as experts', have their scales in a parametrisation.
        state = None if names else getattr(module, "quant_state", None)
        if hasattr(state, "absmax"):
            self._add_parts(f"{prefix}quant_state", four_bit_state(state, prefix.rstrip(".")))

    def _add_parts(self, label: str, weight: QuantisedWeight) -> None:
        """Add a line for each part of a quantised weight; these are never cast."""
        self.lines.append(f"{label} = {weight.kind}, {weight.origin}")
        for part, tensor in weight.parts.items():
            dtype, fingerprint = self._fingerprint(tensor, tensor.dtype)
            self.lines.append(f"{label}:{part} {dtype} {fingerprint}")

    def _read_adapters(self, layer: Any, prefix: str) -> None:
        """Read what the active adapters of a PEFT layer add to its base layer."""
        # A merged adapter is part of the base layer's weight, which has been read already.
        if layer.disable_adapters or layer.merged:
            if layer.disable_adapters and layer.merged:
                raise ModelError(
                    f"{prefix.rstrip('.')}: its adapter is merged into the weights and switched "
                    "off at once, so its next forward would change them; unmerge it first."
                )
            return
        for index, adapter in enumerate(layer.active_adapters):
            # PEFT puts an adapter's name into the names of its tensors: lora_A.<adapter>.weight.
            tensors = {
                name: tensor
                for name, tensor in _tensors_below(layer, skip="base_layer")
                if adapter in name.split(".")
            }
            if not tensors or self._contributes_nothing(layer, adapter, tensors):
                continue
            self.adapters.append((layer, adapter))
            # The label has the adapter's number instead of its name, which changes no log-prob. It
            # has the parameter's name because PEFT wraps a layer once for each adapted parameter.
            label = f"{prefix}{getattr(layer, 'parameter_name', '')}:adapter{index}"
            for name, tensor in tensors.items():
                kind = ".".join(part for part in name.split(".") if part != adapter)
                self._add_line(f"{label}.{kind}", tensor)
            scaling = getattr(layer, "scaling", None)
            if isinstance(scaling, dict):
                self.lines.append(f"{label}.scaling = {scaling.get(adapter)!r}")

    def _contributes_nothing(self, layer: Any, adapter: str, tensors: dict[str, Tensor]) -> bool:
        """Whether an adapter leaves its base layer's output unchanged.

        LoRA adds B (A x) + bias. That is zero while A or B is zero, as in a fresh adapter, and the
        bias is zero too.
        """
        if not _is_plain_lora(layer, adapter):
            return False
        groups: dict[str, list[Tensor]] = {"A": [], "B": [], "bias": []}
        for name, tensor in tensors.items():
            factor = name.split(".")[0]
            if factor not in LORA_FACTORS:
                return False
            groups["bias" if name.endswith(".bias") else factor[-1]].append(tensor)
        nonzero = {group: any(map(self._any_nonzero, parts)) for group, parts in groups.items()}
        return not nonzero["bias"] and not (nonzero["A"] and nonzero["B"])

    def _any_nonzero(self, tensor: Tensor) -> bool:
        with self._whole(tensor, "an adapter's tensor") as whole:
            return bool(whole.any())

    def _add_line(self, name: str, tensor: Tensor) -> None:
        """Add the line of a named tensor, and count the tensor."""
        if id(tensor) not in self._hashed:
            with self._whole(tensor, name) as whole:
                self._hashed[id(tensor)] = self._fingerprint(whole)
        dtype, fingerprint = self._hashed[id(tensor)]
        self.lines.append(f"{name} {dtype} {fingerprint}")
        self.dtypes[dtype] += 1

    def _fingerprint(self, tensor: Tensor, dtype: torch.dtype | None = None) -> tuple[str, str]:
        """Hash a whole tensor.

        Args:
            tensor: tensor that isn't sharded.
            dtype: dtype to hash it in; by default `scoring_dtype`, if it is a floating-point tensor
                and that is set.

        Returns:
            The dtype, and the tensor's shape followed by the XXH3-128 of its bytes in row-major
            order.
        """
        if dtype is None:
            is_cast = self.scoring_dtype is not None and tensor.is_floating_point()
            dtype = self.scoring_dtype if is_cast else tensor.dtype
        assert dtype is not None
        flat = tensor.detach().reshape(-1)  # a copy only if the tensor isn't contiguous
        hasher = xxh3_128()
        for start in range(0, flat.numel(), CHUNK_ELEMENTS):
            chunk = flat[start : start + CHUNK_ELEMENTS].to("cpu", dtype).contiguous()
            hasher.update(chunk.view(torch.uint8).numpy().data)
        return dtype_name(dtype), f"{list(tensor.shape)} {hasher.hexdigest()}"

    def _whole(self, tensor: Tensor, name: str) -> Any:
        """Return a context manager that yields the whole tensor, gathered from its shards.

        Raises:
            ModelError: the tensor isn't whole in this process and there is no `gather`.
        """
        if self.gather is not None:
            return self.gather(tensor)
        if tensor.is_meta or hasattr(tensor, "ds_id") or hasattr(tensor, "full_tensor"):
            raise ModelError(
                f"{name} is not whole in this process (sharded or not loaded), so the reference "
                "can't be identified; load the model unsharded, or pass `gather`."
            )
        return nullcontext(tensor)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's own parameters and saved buffers; other buffers follow from the config."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield name, tensor


def _is_rounded(buffer: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a floating-point buffer was cast away from float32, in which models create it."""
    return buffer is not None and buffer.is_floating_point() and buffer.dtype != torch.float32


def _tensors_below(module: nn.Module, skip: str) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a module, unsaved buffers included; leave out children named `skip`."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor
    for child_name, child in module._modules.items():
        if child is not None and child_name != skip:
            for name, tensor in _tensors_below(child, skip):
                yield f"{child_name}.{name}", tensor


def _module_in_use(wrapper: Any) -> Any:
    """Return the module that PEFT's `modules_to_save` wrapper calls.

    That is the trained copy, or the original while adapters are switched off.
    """
    active = [] if wrapper.disable_adapters else wrapper.active_adapters
    if active and active[0] in wrapper.modules_to_save:
        return wrapper.modules_to_save[active[0]]
    return wrapper.original_module


def _is_plain_lora(layer: Any, adapter: str) -> bool:
    """Whether an adapter is LoRA as in its paper; DoRA and other variants mark their layer."""
    marks = (getattr(layer, "lora_variant", {}), getattr(layer, "use_dora", {}))
    return hasattr(layer, "lora_B") and not any(mark.get(adapter) for mark in marks)


def _adapter_options(model: Any, adapters: set[str]) -> dict[str, Any]:
    """Select the options of the named adapters that can change a log-prob."""
    options = {}
    for adapter in sorted(adapters):
        known = scoring_options(model.peft_config[adapter].to_dict())
        kept = {name: value for name, value in known.items() if name not in ADAPTER_ORIGIN}
        # PEFT keeps names in sets, whose order differs from process to process.
        options[adapter] = {
            name: sorted(value) if isinstance(value, set) else value for name, value in kept.items()
        }
    return options
