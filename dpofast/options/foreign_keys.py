"""What to write here for the options of other tools: axolotl, LLaMA-Factory, OpenRLHF, ms-swift,
Hugging Face's alignment handbook, TRL's scripts and versions 4 of transformers."""

from __future__ import annotations

# Options of other tools that only have another name here; the value has the same meaning.
OTHER_NAMES = {
    **dict.fromkeys(
        ("base_model", "model", "model_name", "model_path", "model_id", "pretrain"),
        "model_name_or_path",
    ),
    **dict.fromkeys(
        (
            "ref_model",
            "ref_pretrain",
            "ref_model_path",
            "reference_model",
            "reference_model_name_or_path",
        ),
        "ref_model_name_or_path",
    ),
    **dict.fromkeys(("revision_of_model", "model_version"), "model_revision"),
    **dict.fromkeys(("tokenizer", "tokenizer_name", "tokenizer_config"), "tokenizer_name_or_path"),
    "attn_impl": "attn_implementation",
    **dict.fromkeys(("chat_template_jinja", "tokenizer_chat_template"), "chat_template"),
    "quantization_type": "bnb_4bit_quant_type",
    "double_quantization": "use_bnb_nested_quant",
    # data
    **dict.fromkeys(
        ("dataset", "data_path", "dataset_path", "train_data", "train_dataset"), "dataset_name"
    ),
    **dict.fromkeys(("val_dataset", "eval_data", "val_file"), "eval_dataset_name"),
    **dict.fromkeys(("train_split", "dataset_split"), "dataset_train_split"),
    "test_split": "dataset_test_split",
    "dataset_probs": "dataset_shares",
    **dict.fromkeys(
        ("preprocessing_num_workers", "dataset_processes", "num_proc"), "dataset_num_proc"
    ),
    # length
    **dict.fromkeys(
        (
            "cutoff_len",
            "sequence_len",
            "max_len",
            "max_seq_len",
            "max_seq_length",
            "model_max_length",
        ),
        "max_length",
    ),
    "max_prompt_len": "max_prompt_length",
    **dict.fromkeys(("max_answer_length", "max_response_length"), "max_completion_length"),
    # loss
    **dict.fromkeys(("pref_beta", "rl_beta", "dpo_beta"), "beta"),
    **dict.fromkeys(("pref_loss", "dpo_loss_type"), "loss_type"),
    "dpo_label_smoothing": "label_smoothing",
    **dict.fromkeys(("moe_aux_loss_coef", "aux_loss_coef"), "router_aux_loss_coef"),
    # training
    **dict.fromkeys(
        ("micro_batch_size", "micro_train_batch_size", "per_device_batch_size"),
        "per_device_train_batch_size",
    ),
    "eval_batch_size": "per_device_eval_batch_size",
    **dict.fromkeys(("accumulate_grad_batches", "grad_accum_steps"), "gradient_accumulation_steps"),
    **dict.fromkeys(("num_epochs", "epochs", "max_epochs", "n_epochs"), "num_train_epochs"),
    "lr": "learning_rate",
    "lr_warmup_ratio": "warmup_ratio",
    **dict.fromkeys(("lr_scheduler", "scheduler_type"), "lr_scheduler_type"),
    "optimizer": "optim",
    "l2": "weight_decay",
    **dict.fromkeys(("max_norm", "grad_clip", "gradient_clipping"), "max_grad_norm"),
    **dict.fromkeys(("save_path", "save_dir"), "output_dir"),
    "max_ckpt_num": "save_total_limit",
    **dict.fromkeys(("wandb_run_name", "wandb_name"), "run_name"),
    "hf_hub_token": "hub_token",
    "hub_model_revision": "hub_revision",
    # adapters
    "lora_rank": "lora_r",
    "target_modules": "lora_target_modules",
    **dict.fromkeys(("additional_target", "modules_to_save"), "lora_modules_to_save"),
    "peft_use_rslora": "use_rslora",
    "peft_use_dora": "use_dora",
}

_ONLY_DPO = "leave it out; dpofast trains DPO only"
_ADAPTER = "set use_peft: true for LoRA, and leave it out to train the whole model"
_TO_NAMES = (
    "list the names in dataset_name; the numbers there are parts of each dataset, and "
    "dataset_shares, if you set them, are parts of the whole mixture"
)
_BATCH = "set per_device_train_batch_size and gradient_accumulation_steps"
_PACKED = "leave it out; layout says whether rows are packed, and they are by default"
_ATTENTION = "set attn_implementation, to flash_attention_2 for example"
_KERNELS = "leave it out; dpofast's own kernels run"
_TEMPLATE = "leave it out; the tokenizer's chat template is used, or the one in chat_template"
_COLUMNS = "set dataset_columns, such as {prompt: question}"
_LOSS = "leave it out; the loss is named in loss_type"
_GONE = "leave it out; transformers has removed it"
_MODEL_CLASS = "leave it out; the model's config names its class"
_FOLDER = "leave it out; nothing is written but output_dir and the reference store"
_SEQUENCE = "leave it out; ranks share a step's pairs, not a sequence"
_UNSUPPORTED = "leave it out; it isn't supported"
_FAST = "leave it out; the tokenizer's own files say what it is"
_FROZEN = "set requires_grad in Python"
_REFERENCE = "leave it out; the reference never runs during training"

# Options of other tools that mean something else here, or nothing, and what to do instead.
OTHER_KEYS = {
    **dict.fromkeys(("stage", "rlhf_type", "rl", "trainer_type"), _ONLY_DPO),
    **dict.fromkeys(
        (
            *("adapter", "finetuning_type", "train_type", "tuner_type", "sft_type"),
            *("lora", "use_lora", "peft"),
        ),
        _ADAPTER,
    ),
    "lora_target": "set lora_target_modules, which for all linear layers is all-linear, not all",
    "qlora": "set use_peft and load_in_4bit",
    **dict.fromkeys(
        ("lora_model_dir", "adapter_name_or_path", "adapters"),
        "name the adapter's folder in model_name_or_path",
    ),
    "create_new_adapter": "merge the old adapter into the model first",
    "lora_target_linear": "set lora_target_modules: all-linear",
    **dict.fromkeys(
        (
            *("loraplus_lr_ratio", "loraplus_lr_embedding", "pissa_init", "relora_steps"),
            *("use_galore", "use_badam", "plugins", "shift_attn", "s2_attention", "rope_scaling"),
            *("lora_fan_in_fan_out", "peft_layers_to_transform", "mixture_of_depths"),
        ),
        _UNSUPPORTED,
    ),
    **dict.fromkeys(("quantization_bit", "quant_bits"), "set load_in_4bit or load_in_8bit"),
    # models
    **dict.fromkeys(("model_type", "tokenizer_type", "cls_model_config"), _MODEL_CLASS),
    "base_model_config": "leave it out; the config is read from the model's folder",
    **dict.fromkeys(("special_tokens", "tokens"), "set pad_token; save others with the tokenizer"),
    **dict.fromkeys(
        ("use_flash_attention_2", "flash_attn", "flash_attention", "sdp_attention"), _ATTENTION
    ),
    **dict.fromkeys(("xformers_attention", "eager_attention", "flex_attention"), _ATTENTION),
    **dict.fromkeys(
        (
            *("enable_liger_kernel", "use_unsloth", "unsloth_cross_entropy_loss"),
            *("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "liger_rope"),
            *("liger_rms_norm", "liger_glu_activation", "liger_fused_linear_cross_entropy"),
        ),
        _KERNELS,
    ),
    **dict.fromkeys(("use_fast_tokenizer", "tokenizer_use_fast", "disable_fast_tokenizer"), _FAST),
    **dict.fromkeys(("image_max_pixels", "video_max_pixels", "max_pixels"), _UNSUPPORTED),
    "cache_dir": "set HF_HOME in the environment",
    **dict.fromkeys(
        ("ref_offload", "ref_model_adapters", "ref_model_quantization_bit"), _REFERENCE
    ),
    "reward_model": "leave it out; DPO learns from pairs, without a reward model",
    # data
    **dict.fromkeys(("dataset_mixer", "dataset_mixture"), _TO_NAMES),
    "dataset_splits": "set dataset_train_split and dataset_test_split",
    "dataset_configs": "set dataset_config, which is the same for all datasets",
    "interleave_probs": "set dataset_shares",
    "mix_strategy": "leave it out; no pair is left out without dataset_shares, none is repeated",
    **dict.fromkeys(
        ("val_set_size", "val_size", "split_dataset_ratio"),
        "set eval_split, which holds out whole prompts",
    ),
    "test_datasets": "name one of the files in eval_dataset_name",
    **dict.fromkeys(
        ("system", "system_prompt", "default_system", "default_system_message"),
        "write system messages in the data",
    ),
    **dict.fromkeys(
        ("dataset_shuffle", "shuffle_merged_datasets"),
        "set train_sampling_strategy, to sequential for no shuffling",
    ),
    **dict.fromkeys(("dataset_dir", "media_dir"), "write the whole path in dataset_name"),
    **dict.fromkeys(("prompt_key", "chosen_key", "rejected_key", "text_column"), _COLUMNS),
    **dict.fromkeys(
        ("max_samples", "max_train_samples"), "leave it out; name a file with fewer pairs"
    ),
    **dict.fromkeys(("overwrite_cache", "dataset_prepared_path", "tokenized_path"), _FOLDER),
    **dict.fromkeys(("load_from_cache_file", "ckpt_path"), _FOLDER),
    **dict.fromkeys(("template", "prompt_template", "input_template"), _TEMPLATE),
    **dict.fromkeys(("apply_chat_template", "auto_insert_empty_system_msg"), _TEMPLATE),
    "use_chat_template": _TEMPLATE,
    **dict.fromkeys(
        ("train_on_inputs", "train_on_prompt", "mask_history", "loss_scale", "roles_to_train"),
        "leave it out; only the last answers are scored",
    ),
    **dict.fromkeys(
        ("sequence_parallel_size", "context_parallel_size", "ring_attn_size", "ring_head_stride"),
        _SEQUENCE,
    ),
    "truncation_side": "set truncation_mode: keep_end cuts prompts on their left",
    **dict.fromkeys(
        ("sample_packing", "eval_sample_packing", "packing", "neat_packing", "batch_flattening"),
        _PACKED,
    ),
    **dict.fromkeys(("pad_to_sequence_len", "packing_samples"), _PACKED),
    # losses
    **dict.fromkeys(
        ("pref_ftx", "sft_alpha", "nll_loss_coef"),
        "set loss_type: [sigmoid, sft] and loss_weights: [1.0, the number]",
    ),
    "pref_bco_weight": "set loss_type: [sigmoid, bco_pair] and loss_weights",
    "kto_desirable_weight": "set loss_type: kto and desirable_weight",
    "kto_undesirable_weight": "set loss_type: kto and undesirable_weight",
    "orpo_alpha": "set loss_type: orpo, whose weight is beta",
    "ipo": "set loss_type: ipo",
    "dpo_norm_loss": "set loss_type: sigmoid_norm",
    "dpo_use_weighting": "set use_weighting, and weighting_clamp: 1.0",
    "dpo_use_logits_to_keep": "leave it out; only answers ever reach the head",
    # training
    **dict.fromkeys(("batch_size", "train_batch_size", "global_batch_size"), _BATCH),
    "adam_betas": "set adam_beta1 and adam_beta2",
    "adafactor": "set optim: adafactor",
    "zero_stage": "set deepspeed: zero2 or zero3",
    "adam_offload": "set deepspeed: zero2_offload or zero3_offload",
    "evals_per_epoch": "set eval_strategy: steps and eval_steps, a share of all steps if below 1",
    "saves_per_epoch": "set save_strategy: steps and save_steps, a share of all steps if below 1",
    "early_stopping_patience": "add transformers' EarlyStoppingCallback in Python",
    **dict.fromkeys(("use_wandb", "use_swanlab", "use_tensorboard"), "name it in report_to"),
    **dict.fromkeys(
        (
            *("wandb_project", "wandb_entity", "wandb_org", "wandb_group", "wandb_run_id"),
            *("wandb_mode", "wandb_watch", "wandb_log_model"),
        ),
        "set wandb's variables, such as WANDB_PROJECT, in the environment",
    ),
    "env": "set the variables in the environment",
    **dict.fromkeys(("unfrozen_parameters", "freeze_parameters", "freeze_vit"), _FROZEN),
    **dict.fromkeys(("freeze_trainable_layers", "num_layer_trainable"), _FROZEN),
    "plot_loss": "leave it out; output_dir has a plot of every run",
    **dict.fromkeys(
        ("load_checkpoint", "auto_resume_from_checkpoints"), "set resume_from_checkpoint: true"
    ),
    "noisy_embedding_alpha": "leave it out; the policy would differ from its reference",
    "gradient_checkpointing_use_reentrant": "set gradient_checkpointing_kwargs",
    "sanity_check": "leave it out; name a file with fewer pairs",
    # versions 4 of transformers
    "include_tokens_per_second": "leave it out; tokens_per_second is always logged",
    **dict.fromkeys(("dispatch_batches", "split_batches"), "leave it out; steps are planned"),
    **dict.fromkeys(("fp16_backend", "half_precision_backend", "fp16_opt_level"), _GONE),
    **dict.fromkeys(("jit_mode_eval", "use_ipex", "use_mps_device", "xpu_backend"), _GONE),
    **dict.fromkeys(("past_index", "mp_parameters", "ray_scope", "tpu_num_cores"), _GONE),
    **dict.fromkeys(("include_inputs_for_metrics", "use_legacy_prediction_loop"), _GONE),
    "torchdynamo": "leave it out; rows differ in every step, and would compile each time",
    "fsdp_transformer_layer_cls_to_wrap": "set deepspeed to zero2 or zero3",
    "fsdp_min_num_params": "set deepspeed to zero2 or zero3",
    "push_to_hub_organization": "write the organization in hub_model_id, as in org/name",
}

_LORA = "pass peft_config=peft.LoraConfig(...) to DPOTrainer"
_PAIRS = "pass train_dataset, which dpofast.data.load_preferences reads, to DPOTrainer"
_LOADING = "set model_init_kwargs"
_QUANTISED = "pass quantization_config to DPOTrainer"

# Options of YAML files and the command line, and what takes their place in Python.
IN_PYTHON = {
    "model_name_or_path": "pass model to DPOTrainer",
    "ref_model_name_or_path": "pass ref_model to DPOTrainer",
    "tokenizer_name_or_path": "pass processing_class to DPOTrainer",
    "chat_template": "set the tokenizer's chat_template",
    **dict.fromkeys(("model_revision", "dtype", "torch_dtype", "attn_implementation"), _LOADING),
    **dict.fromkeys(("dataset_name", "dataset_config", "dataset_train_split"), _PAIRS),
    **dict.fromkeys(("dataset_columns", "columns"), "pass columns to DPOTrainer"),
    **dict.fromkeys(("dataset_roles", "roles"), "pass roles to DPOTrainer"),
    **dict.fromkeys(
        ("dataset_shares", "dataset_weights"), "mix the datasets with dpofast.data.mix_preferences"
    ),
    "eval_split": "hold pairs out with dpofast.data.hold_out",
    **dict.fromkeys(("eval_dataset_name", "dataset_test_split"), "pass eval_dataset to DPOTrainer"),
    **dict.fromkeys(("use_peft", "lora_r", "lora_alpha", "lora_dropout", "use_rslora"), _LORA),
    **dict.fromkeys(
        ("lora_target_modules", "lora_modules_to_save", "lora_task_type", "use_dora"), _LORA
    ),
    **dict.fromkeys(("lora_target_parameters", "peft_config"), _LORA),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type"), _QUANTISED),
    **dict.fromkeys(("use_bnb_nested_quant", "bnb_4bit_quant_storage"), _QUANTISED),
    "bnb_4bit_compute_dtype": _QUANTISED,
    "dataset_streaming": "pass an IterableDataset as train_dataset",
}
