"""The options of the command line that DPOConfig doesn't have: models, data and adapters.

`--help` imports this file, so it must not import torch or transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_type_hints


@dataclass(frozen=True)
class ScriptOptions:
    """The models, data and adapter of a run.

    The names are the same as in TRL's scripts and in the recipes of Hugging Face's alignment
    handbook. The text beside each type is the option's help.
    """

    model_name_or_path: Annotated[str | None, "The policy: a folder or hub name."] = None
    model_revision: Annotated[str | None, "The policy's branch, tag or commit on the hub."] = None
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"] | None,
        "Dtype of the weights; by default float32, with mixed precision if bf16 or fp16 is set.",
    ] = None
    attn_implementation: Annotated[str | None, "eager, sdpa, flash_attention_2, ..."] = None
    load_in_8bit: Annotated[
        bool, "Quantise the base model to 8 bits with bitsandbytes; needs use_peft."
    ] = False
    load_in_4bit: Annotated[
        bool, "Quantise the base model to 4 bits with bitsandbytes; needs use_peft."
    ] = False
    bnb_4bit_quant_type: Annotated[Literal["fp4", "nf4"], "Quantisation type of 4 bits."] = "nf4"
    use_bnb_nested_quant: Annotated[bool, "Quantise the scales of 4-bit weights as well."] = False
    bnb_4bit_quant_storage: Annotated[
        str | None, "Dtype that 4-bit weights are stored in; by default uint8."
    ] = None
    bnb_4bit_compute_dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        "Dtype that 4-bit layers compute in; by default dtype.",
    ] = None
    ref_model_name_or_path: Annotated[
        str | None, "The reference; by default the policy before training."
    ] = None
    tokenizer_name_or_path: Annotated[str | None, "The tokenizer; by default the policy's."] = None
    chat_template: Annotated[str | None, "A Jinja chat template, or the file that holds one."] = (
        None
    )
    dataset_name: Annotated[
        list[str] | str | None, "Training pairs: a file, folder or hub name, or several."
    ] = None
    dataset_shares: Annotated[
        list[float] | None, "Share of each of several datasets; by default all pairs are taken."
    ] = None
    dataset_weights: Annotated[
        list[float] | None, "Weight of each dataset's pairs in the loss; 1 by default."
    ] = None
    dataset_streaming: Annotated[
        bool, "Read the training pairs while the run trains; needs max_steps."
    ] = False
    dataset_config: Annotated[str | None, "Configuration of a hub dataset."] = None
    dataset_train_split: Annotated[str, "Split of the training pairs."] = "train"
    dataset_test_split: Annotated[
        str | None, "Split of the held-out pairs, of eval_dataset_name or else of dataset_name."
    ] = None
    eval_dataset_name: Annotated[str | None, "Held-out pairs: a file, folder or hub name."] = None
    eval_split: Annotated[
        int | float | None, "Part of the training pairs to hold out by prompt, or their number."
    ] = None
    dataset_columns: Annotated[
        dict[str, str] | None, "Mapping from dpofast's column names to those in your data."
    ] = None
    dataset_roles: Annotated[
        dict[str, str] | None,
        "Mapping from roles in your data to system, user, assistant or tool.",
    ] = None
    use_peft: Annotated[bool, "Train a LoRA adapter instead of the whole model."] = False
    lora_r: Annotated[int, "Rank of the adapter."] = 16
    lora_alpha: Annotated[int, "The adapter's scale times its rank."] = 32
    lora_dropout: Annotated[float, "The adapter's dropout; disable_dropout sets it to 0."] = 0.0
    lora_target_modules: Annotated[
        list[str] | str | None,
        "Modules with an adapter; by default those peft knows for the model.",
    ] = None
    lora_target_parameters: Annotated[
        list[str] | None, "Parameters with an adapter, such as those of experts."
    ] = None
    lora_modules_to_save: Annotated[list[str] | None, "Modules that are trained in full."] = None
    lora_task_type: Annotated[Literal["CAUSAL_LM"], "The only task there is."] = "CAUSAL_LM"
    use_rslora: Annotated[bool, "Scale the adapter by lora_alpha over the root of lora_r."] = False
    use_dora: Annotated[bool, "Train the magnitudes of weights, too (DoRA)."] = False

    @property
    def model(self) -> str:
        """The policy's name; `RunOptions.require` has checked that it is given."""
        assert self.model_name_or_path is not None
        return self.model_name_or_path

    @property
    def dataset_names(self) -> list[str]:
        """The names in dataset_name; empty if there is none."""
        name = self.dataset_name
        return [name] if isinstance(name, str) else list(name or ())

    @property
    def tokenizer(self) -> str:
        """The tokenizer's name, by default the policy's."""
        return self.tokenizer_name_or_path or self.model


def script_help() -> dict[str, str]:
    """One line of help for each option, by name."""
    hints = get_type_hints(ScriptOptions, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


# Names that other tools use for the same options.
ALIASES = {
    "torch_dtype": "dtype",
    "train_file": "dataset_name",
    "eval_file": "eval_dataset_name",
    "eval_dataset": "eval_dataset_name",
    "columns": "dataset_columns",
    "roles": "dataset_roles",
}
