"""The tensors that from_pretrained expects of a saved model, against those that are saved.

Everything here works with names and shapes. No weights are read or made: the model that expects
them is built on the device "meta", from its class and its config.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from dpofast.errors import one_line
from dpofast.model.parts import causal_lm, is_peft_model, shape

logger = logging.getLogger(__name__)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
SHOWN = 3  # names that a message shows

Shapes = dict[str, tuple[int, ...]]


@dataclass
class NameDifference:
    """How a set of tensors differs from the one that from_pretrained expects.

    Attributes:
        missing: tensors that it would fill at random.
        misshapen: tensors whose shape is another one.
        unknown: tensors that it would leave unread.
        tied: tensors that share their memory, though the config doesn't say so. Only one of them
            is saved, and the others would be filled at random.
    """

    missing: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)

    @property
    def is_harmful(self) -> bool:
        """Whether a loaded model would be another one than the saved one."""
        return bool(self.missing or self.misshapen or self.tied)

    def __bool__(self) -> bool:
        return self.is_harmful or bool(self.unknown)

    def __str__(self) -> str:
        parts = (
            ("missing", self.missing),
            ("of another shape", self.misshapen),
            ("not known to it", self.unknown),
            ("tied to each other without a word in the config", self.tied),
        )
        return "; ".join(f"{len(names)} {what} ({_some(names)})" for what, names in parts if names)


def difference_in_memory(model: Any) -> NameDifference:
    """Compares a model's tensors with those of a new model of its class and config.

    A difference means that a saved model won't load as it was. It comes from wrappers around
    submodules, from layers that were taken out or resized without the config, and the like. Of a
    PeftModel, only the adapters are compared, as only these are saved.

    Returns:
        The differences; none if no such model can be built, or for quantised models, which are
        loaded in another way.
    """
    lm = causal_lm(model)
    if _is_loaded_otherwise(lm):
        return NameDifference()
    with _built_quietly() as built:
        skeleton = _skeleton(lm)
        if is_peft_model(model):
            found, expected = {}, {}
            for name in model.peft_config:
                found.update(_adapter_shapes(model, name))
                expected.update(_adapter_shapes(_skeleton_adapter(model, skeleton, name), name))
            built.append(_compare(found, expected))
        else:
            difference = _compare(_shapes(lm), _shapes(skeleton))
            known = _ties(skeleton)
            difference.tied = sorted(set().union(*(_ties(lm) - known)))
            built.append(difference)
    return built[0] if built else NameDifference()


def difference_in_files(folder: str | Path, model: Any) -> NameDifference:
    """Compares the tensors that a folder's files name with those that from_pretrained expects.

    Args:
        folder: folder that save_pretrained has written.
        model: the model that was saved.

    Returns:
        The differences; none if the folder holds no safetensors files, as where DeepSpeed saves
        the weights by itself, or if no model can be built to compare with.
    """
    folder, lm = Path(folder), causal_lm(model)
    if _is_loaded_otherwise(lm):
        return NameDifference()
    with _built_quietly() as built:
        if is_peft_model(model):
            built.append(_difference_of_adapters(folder, model))
        elif (found := saved_shapes(folder)) is not None:
            built.append(_difference_on_loading(folder, lm, found))
    return built[0] if built else NameDifference()


def can_have_pad(model: Any, pad_token_id: int) -> bool:
    """Whether from_pretrained could build the model if its config had this pad token.

    Families that tell their embedding of the pad token can't have one without a row there.
    """
    lm = causal_lm(model)
    config = copy.deepcopy(lm.config)
    config.pad_token_id = pad_token_id
    try:
        with torch.random.fork_rng(devices=[]), _without_zero(), torch.device("meta"):
            type(lm)(config)
    except AssertionError:  # of nn.Embedding
        return False
    except Exception:  # models' own code can raise anything, whatever the pad token
        return True
    return True


def saved_shapes(folder: Path, file: str = WEIGHTS) -> Shapes | None:
    """Names and shapes of the tensors in a safetensors file, or in all that its index names.

    Returns:
        None if there is neither the file nor an index.
    """
    files = [folder / file]
    if not files[0].is_file():
        if not (folder / INDEX).is_file():
            return None
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        files = [folder / name for name in sorted(set(index["weight_map"].values()))]
    found: Shapes = {}
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dict
                found[name] = tuple(tensors.get_slice(name).get_shape())
    return found


def _difference_on_loading(folder: Path, lm: Any, found: Shapes) -> NameDifference:
    """Lets from_pretrained itself load tensors of these names and shapes, without their values."""
    state = {name: torch.empty(size, device="meta") for name, size in found.items()}
    config = type(lm.config).from_pretrained(folder)
    options = {"config": config, "device_map": "meta", "output_loading_info": True}
    try:
        _, info = type(lm).from_pretrained(None, state_dict=state, **options)
    except RuntimeError as error:
        # transformers puts some weights together from several tensors, such as those of experts.
        if "conversion of the weights" not in str(error):
            raise
        return NameDifference(missing=["parts of a weight that several tensors make up"])
    misshapen = [entry[0] for entry in info["mismatched_keys"]]
    return NameDifference(
        sorted(info["missing_keys"]), sorted(misshapen), sorted(info["unexpected_keys"])
    )


def _difference_of_adapters(folder: Path, model: Any) -> NameDifference:
    skeleton = _skeleton(causal_lm(model))
    total = NameDifference()
    for name in model.peft_config:
        own = folder if name == "default" else folder / name
        found = saved_shapes(own, ADAPTER_WEIGHTS)
        if found is None:
            continue
        expected = _adapter_shapes(_skeleton_adapter(model, skeleton, name), name)
        # An embedding is saved beside an adapter if its vocabulary may have changed; see
        # `save_embedding_layers` in peft.
        embeddings = {key for key in found if key not in expected and ".lora_" not in key}
        part = _compare({k: v for k, v in found.items() if k not in embeddings}, expected)
        total.missing += part.missing
        total.misshapen += part.misshapen
        total.unknown += part.unknown
    return total


def _is_loaded_otherwise(lm: Any) -> bool:
    """Whether from_pretrained builds this model in a way of its own, and not from its config."""
    is_quantised = getattr(lm, "hf_quantizer", None) is not None
    return is_quantised or bool(getattr(lm, "_hf_peft_config_loaded", False))


@contextlib.contextmanager
def _built_quietly() -> Iterator[list[NameDifference]]:
    """Inside the `with` block, models are built on "meta" without logs, bars or random numbers.

    An exception ends the block: what can't be built can't be compared.

    Yields:
        A list for the result.
    """
    verbosity = transformers_logging.get_verbosity()
    has_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]), _without_zero():
            yield []
    except Exception as error:  # models' own code can raise anything
        reason = f"{type(error).__name__}: {one_line(error)}"
        logger.warning("The names of saved tensors can't be compared (%s).", reason)
    finally:
        transformers_logging.set_verbosity(verbosity)
        if has_bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _without_zero() -> Iterator[None]:
    """Inside the `with` block, transformers doesn't shard new models, which only one rank makes."""
    from transformers.integrations import deepspeed

    reference = getattr(deepspeed, "_hf_deepspeed_config_weak_ref", None)
    config = None if reference is None else reference()
    if config is None:
        yield
        return
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(config)


def _skeleton(lm: Any) -> Any:
    """A new model of the same class and config, without weights."""
    config = copy.deepcopy(lm.config)
    config.dtype = lm.dtype  # saving writes it as text, which some constructors don't take
    with torch.device("meta"):
        return type(lm)(config)


def _skeleton_adapter(model: Any, skeleton: Any, name: str) -> Any:
    """The skeleton inside a new adapter of the same config."""
    from peft import PeftModel

    config = copy.deepcopy(model.peft_config[name])
    for option in ("init_lora_weights", "init_weights"):
        if hasattr(config, option):
            setattr(config, option, True)  # other ways would look into weights, which don't exist
    with torch.device("meta"):
        return PeftModel(copy.deepcopy(skeleton), config, adapter_name=name)


def _adapter_shapes(model: Any, name: str) -> Shapes:
    from peft import get_peft_model_state_dict

    whole = model.state_dict(keep_vars=True)
    state = get_peft_model_state_dict(
        model, state_dict=whole, adapter_name=name, save_embedding_layers=False
    )
    return {key: tuple(shape(tensor)) for key, tensor in state.items()}


def _shapes(module: nn.Module) -> Shapes:
    state: dict[str, Tensor] = module.state_dict(keep_vars=True)  # ZeRO-3's shapes are lost else
    return {name: tuple(shape(tensor)) for name, tensor in state.items()}


def _ties(module: nn.Module) -> set[frozenset[str]]:
    """The names of parameters that are one object, together."""
    names: dict[int, set[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(same) for same in names.values() if len(same) > 1}


def _compare(found: Shapes, expected: Shapes) -> NameDifference:
    return NameDifference(
        missing=sorted(expected.keys() - found.keys()),
        misshapen=sorted(
            name for name in expected.keys() & found.keys() if expected[name] != found[name]
        ),
        unknown=sorted(found.keys() - expected.keys()),
    )


def _some(names: list[str]) -> str:
    return ", ".join([*names[:SHOWN], *(["..."] if len(names) > SHOWN else [])])
