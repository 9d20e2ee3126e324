"""Reads all options of a run, and checks their names, types and values."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from dpofast.cli.data_options import check_data_options
from dpofast.cli.given import COMMAND_LINE, GivenOption, read_overrides, read_yaml
from dpofast.cli.option_types import checked_value
from dpofast.cli.quantisation import quantization_config
from dpofast.cli.script_options import ALIASES, ScriptOptions
from dpofast.errors import ConfigError, ModelError, SeveralOptionsError, options_error

if TYPE_CHECKING:
    from dpofast.options.config import DPOConfig


@dataclass(frozen=True)
class RunOptions:
    """All options of a run, checked.

    Attributes:
        script: options for the models, the data and the adapter.
        config: options for the trainer.
        source: name of the YAML file, or "command line"; used in error messages.
    """

    script: ScriptOptions
    config: DPOConfig
    source: str

    def require(self, *names: str) -> None:
        """Raise ConfigError if one of these options of the script is missing."""
        for name in names:
            if getattr(self.script, name) is None:
                example = "name: value" if self.source != COMMAND_LINE else "--name value"
                raise ConfigError(
                    f"{self.source}: {name} is missing; give it as "
                    f"`{example.replace('name', name, 1)}`."
                )


def read_options(
    yaml_file: str | None, overrides: Sequence[str], own: Sequence[str] = ()
) -> RunOptions:
    """Read all options and check their names, types and values, without loading models or data.

    Args:
        yaml_file: path of the YAML file, None if there is none.
        overrides: options on the command line, which win over the file.
        own: names of options that only this command has. They have been read already; here they
            only serve as suggestions for misspelt names.

    Raises:
        ConfigError: an option is unknown or unusable; names the option and where it is given.
    """
    given = read_yaml(yaml_file) if yaml_file else {}
    source = yaml_file or COMMAND_LINE
    given = _canonical(given) | _canonical(read_overrides(overrides))
    _refuse_model_kinds(given)
    known = _known_types()
    _refuse_unknown(given, known, own)
    values = {
        name: checked_value(name, option.value, known[name], option.where)
        for name, option in given.items()
        if name in known
    }
    script_names = {item.name for item in fields(ScriptOptions)}
    script = ScriptOptions(**{k: v for k, v in values.items() if k in script_names})
    _refuse_idle_adapter_options(script, given)
    check_data_options(script, given)
    options = {k: v for k, v in values.items() if k not in script_names}
    return RunOptions(script, _config(options, given, script, source), source)


def _refuse_idle_adapter_options(script: ScriptOptions, given: dict[str, GivenOption]) -> None:
    for name, option in given.items():
        is_adapter = name.startswith("lora_") or name in ("use_rslora", "use_dora")
        if is_adapter and not script.use_peft:
            raise ConfigError(
                f"{option.where}: {name} has no effect without use_peft: true; add that, or leave "
                f"{name} out to train the whole model."
            )


def _refuse_model_kinds(given: dict[str, GivenOption]) -> None:
    """Raise ModelError for a model that can't be trained, whatever the other options are.

    This looks at local files only. A config that is still on the hub is read with the tokenizer.
    """
    from dpofast.model.kind import refuse_stored_kind
    from dpofast.options.foreign_keys import OTHER_NAMES

    revision = given.get("model_revision")
    for name, option in given.items():
        ours = OTHER_NAMES.get(name, name)  # the name in another tool's file does, too
        if ours not in ("model_name_or_path", "ref_model_name_or_path"):
            continue
        if not isinstance(option.value, str):
            continue
        own = {"revision": revision.value} if revision and ours == "model_name_or_path" else {}
        try:
            refuse_stored_kind(option.value, local_files_only=True, **own)
        except ModelError as error:
            raise ModelError(f"{option.where}: {name}: {error}") from None


def _canonical(given: dict[str, GivenOption]) -> dict[str, GivenOption]:
    """Rename aliases to our own names.

    Raises:
        ConfigError: an option is given under two names.
    """
    names: dict[str, str] = {}  # our own name -> the name that is given
    for name, option in given.items():
        other = names.setdefault(ALIASES.get(name, name), name)
        if other != name:
            raise ConfigError(
                f"{option.where}: {other} and {name} are one option; keep one of them."
            )
    return {own_name: given[name] for own_name, name in names.items()}


@functools.cache
def _known_types() -> dict[str, Any]:
    """The type of each option that can be given."""
    from dpofast.options.config import DPOConfig

    hints = get_type_hints(DPOConfig) | get_type_hints(ScriptOptions)
    # transformers says `str | None`, but its Trainer also takes True, for the newest checkpoint.
    hints["resume_from_checkpoint"] = str | bool | None
    names = [item.name for item in (*fields(DPOConfig), *fields(ScriptOptions)) if item.init]
    return {name: hints[name] for name in names}


def _own_names() -> list[str]:
    """The options that TrainingArguments doesn't have."""
    from transformers import TrainingArguments

    from dpofast.options.config import DPOConfig
    from dpofast.options.foreign import hintable

    inherited = {item.name for item in fields(TrainingArguments)}
    own = hintable(item.name for item in (*fields(ScriptOptions), *fields(DPOConfig)))
    return [name for name in own if name not in inherited]


def _refuse_unknown(
    given: dict[str, GivenOption], known: dict[str, Any], own: Sequence[str]
) -> None:
    """Raise ConfigError with one line for each option that doesn't exist."""
    from dpofast.options.foreign import about_unknown

    # TrainingArguments has over a hundred options. A misspelt name is more likely one of ours.
    likely = [*own, *_own_names(), *ALIASES]
    wrong = []
    for name, option in given.items():
        if name in known:
            continue
        if name in own:
            sentence: str | None = f"{name} belongs on the command line, as `--{name} N`."
        else:
            sentence = about_unknown(name, option.value, known, likely)
        if sentence is not None:
            wrong.append((option, sentence))
    if len(wrong) == 1:
        option, sentence = wrong[0]
        raise ConfigError(f"{option.where}: {sentence}")
    if wrong:
        raise options_error([f"{option.place}: {sentence}" for option, sentence in wrong])


def _config(
    options: dict[str, Any], given: dict[str, GivenOption], script: ScriptOptions, source: str
) -> DPOConfig:
    from dpofast.options.config import DPOConfig

    # transformers' own default would put every run into the same folder.
    if script.model_name_or_path:
        options.setdefault("output_dir", f"{Path(script.model_name_or_path).name}-DPO")
    # transformers' default follows its log level, of which a command shows only errors.
    options.setdefault("disable_tqdm", False)
    quantisation = quantization_config(script, given)
    try:
        options["model_init_kwargs"] = _init_kwargs(options, script, quantisation)
        return DPOConfig(**options)
    except SeveralOptionsError as error:
        raise SeveralOptionsError(f"{source}: {error}") from error
    except (ValueError, TypeError, ImportError) as error:
        # DPOConfig's messages begin with the option's name, so we can look up where it was given.
        named = [name for name in given if str(error).startswith(name)]
        where = given[max(named, key=len)].where if named else source
        raise ConfigError(f"{where}: {error}") from error


def _init_kwargs(
    options: dict[str, Any], script: ScriptOptions, quantisation: dict[str, Any] | None
) -> dict[str, Any] | None:
    """The arguments of `from_pretrained`: model_init_kwargs, and what other options say of them.

    Raises:
        ConfigError: model_init_kwargs can't be read, or differs from another option.
    """
    from dpofast.options.init_kwargs import read_init_kwargs

    option = "model_init_kwargs"
    arguments = read_init_kwargs(option, options.get(option)) or {}
    bits = "load_in_4bit" if script.load_in_4bit else "load_in_8bit"
    for name, source, value in (
        ("revision", "model_revision", script.model_revision),
        ("dtype", "dtype", script.dtype),
        ("attn_implementation", "attn_implementation", script.attn_implementation),
        ("quantization_config", bits, quantisation),
    ):
        if value is None:
            continue
        if arguments.get(name, value) != value:
            raise ConfigError(
                f"{option}: its {name} isn't what the option {source} sets; give it in one place."
            )
        arguments = {**arguments, name: value}
    return arguments or None
