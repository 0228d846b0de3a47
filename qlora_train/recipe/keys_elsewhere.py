"""What other programs call the keys and sections of a recipe, and which of theirs have no like here."""

from __future__ import annotations

# What peers call our keys and sections. An entry is a courtesy in a message, never an alias that loads.
OLD_KEYS: dict[str, str] = {
    **dict.fromkeys(("base_model", "model_name_or_path", "model_name", "model_id", "pretrained_model"), "model.path"),
    **dict.fromkeys(("torch_dtype", "dtype", "bf16", "bnb_4bit_compute_dtype"), "model.compute_dtype"),
    **dict.fromkeys(("load_in_4bit", "quantization_bit", "bnb_4bit_quant_type", "bits"), "quant.quant_type"),
    **dict.fromkeys(("bnb_4bit_use_double_quant", "use_double_quant"), "quant.double_quant"),
    **dict.fromkeys(("bnb_4bit_quant_storage", "bnb_4bit_quant_storage_dtype"), "quant.storage_dtype"),
    **dict.fromkeys(("lora_r", "rank", "lora_rank"), "adapter.r"),
    **dict.fromkeys(("lora_target", "lora_target_modules", "lora_target_linear"), "adapter.target_modules"),
    **dict.fromkeys(("new_special_tokens", "add_special_tokens", "add_tokens", "special_tokens"), "adapter.new_tokens"),
    **{"lora_alpha": "adapter.alpha", "lora_dropout": "adapter.dropout", "lora_model_dir": "adapter.init_from"},
    **dict.fromkeys(("max_seq_length", "max_length", "cutoff_len", "sequence_len", "model_max_length"), "data.seq_len"),
    **dict.fromkeys(("train_file", "train_files", "dataset", "datasets", "dataset_path"), "data.train"),
    **dict.fromkeys(("eval_file", "validation_file", "eval_dataset", "test_datasets"), "data.eval"),
    **dict.fromkeys(("max_samples", "max_train_samples"), "data.max_train_rows"),
    **{"max_eval_samples": "data.max_eval_rows", "train_on_inputs": "data.loss_on"},
    **dict.fromkeys(("group_by_length", "packing", "sample_packing", "neat_packing", "multipack"), "data.batching"),
    **dict.fromkeys(("val_set_size", "test_size", "validation_split", "split_dataset_ratio"), "data.split"),
    **dict.fromkeys(("num_train_epochs", "num_epochs"), "train.epochs"),
    **dict.fromkeys(("batch_size", "per_device_train_batch_size", "micro_batch"), "train.micro_batch_size"),
    **dict.fromkeys(("gradient_accumulation_steps", "gradient_accumulation"), "train.grad_accum_steps"),
    **{
        "optim": "train.optimizer",
        "lr": "train.learning_rate",
        "warmup_ratio": "train.warmup_frac",
        "gradient_clipping": "train.max_grad_norm",
    },
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "scheduler"), "train.schedule"),
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpointing"), "train.checkpointing"),
    **{"save_steps": "train.save_every", "save_total_limit": "train.keep"},
    **dict.fromkeys(("per_device_eval_batch_size", "eval_batch_size"), "eval.batch_size"),
    **{"eval_steps": "eval.every"},
    **{"output_dir": "run.dir", "logging_steps": "run.log_every", "random_seed": "run.seed"},
    **dict.fromkeys(("report_to", "log_with", "logger", "use_wandb"), "run.trackers"),
    **dict.fromkeys(("wandb_project", "project_name"), "run.tracker_project"),
}
OLD_SECTIONS: dict[str, str] = {
    **dict.fromkeys(("base", "models"), "model"),
    **dict.fromkeys(("quantization", "quantisation", "bnb", "bitsandbytes"), "quant"),
    **dict.fromkeys(("lora", "peft", "qlora"), "adapter"),
    **dict.fromkeys(("training", "trainer", "optim", "optimizer"), "train"),
    **{"dataset": "data", "datasets": "data", "evaluation": "eval", "output": "run"},
}

_EXPORT = "qlora-train export RUN TARGET"
# Keys without a like here, and what to do instead.
NOT_HERE: dict[str, str] = {
    "warmup_steps": "the warm-up is a share of the steps here: write train.warmup_frac: 0.03",
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy"), "remove it; eval.every says after how many steps to measure"
    ),
    "save_strategy": "remove it; train.save_every says after how many steps to save",
    **dict.fromkeys(
        ("load_best_model_at_end", "metric_for_best_model"),
        "remove it: the run folder keeps the adapter of the best held-out loss",
    ),
    "use_dora": "write adapter.method: dora",
    "use_rslora": "write adapter.method: rslora",
    "init_lora_weights": "starts are methods here: write adapter.method: pissa, loftq, eva or lora_ga",
    **dict.fromkeys(("completion_only_loss", "train_on_responses_only"), "write data.loss_on: completion"),
    "assistant_only_loss": "write data.loss_on: assistant",
    "dataset_text_field": "write data.columns: {text: NAME}, with the name of the column",
    "template": "remove it: the model's own chat template is used; model.chat_template names a file with another",
    "resume_from_checkpoint": "remove it, and resume on the command line: qlora-train train RECIPE --resume",
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id"), f"remove it, and upload when the run is done: {_EXPORT} --push OWNER/NAME"
    ),
    "overwrite_output_dir": "remove it: a run is never overwritten; name another run.dir",
    "trust_remote_code": "remove it: code that comes with a model or a data set is never run here",
    "shuffle": "remove it: rows are shuffled anew in every epoch, by run.seed",
    **dict.fromkeys(
        ("flash_attention", "flash_attn", "use_flash_attention_2"),
        "remove it: the rows of a pack are kept apart without it (model.attn_implementation: auto)",
    ),
    "fp16": "remove it: model.compute_dtype is bfloat16, which needs no loss scaling, or float32",
    "neftune_noise_alpha": "remove it: noise on embeddings (NEFTune) is not built in",
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"), "remove it: training uses one process and one device"),
    "task_type": "remove it: every model here is a causal language model",
}
