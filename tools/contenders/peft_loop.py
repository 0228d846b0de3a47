"""PEFT and bitsandbytes in a plain loop over our packs: what a careful user of PEFT writes."""

from __future__ import annotations

from typing import Any

from contenders.job import Options, Rows, recipe_of, start_adapter
from contenders.worker import Loaded, Turns


def quantised_base(options: Options) -> Any:
    """The model as transformers and bitsandbytes load it: NF4, double quantisation, bf16; attention: sdpa."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qlora_train.model.source import resolve_source

    return AutoModelForCausalLM.from_pretrained(
        str(resolve_source(recipe_of("shell", options).model).folder),
        dtype=torch.bfloat16,
        device_map={"": options.device},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )


def lora_config(options: Options) -> Any:
    """LoRA on all linear layers."""
    from peft import LoraConfig

    return LoraConfig(
        r=options.r, lora_alpha=options.alpha, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )


def load(options: Options, variant: str) -> Loaded:
    """Without `prepare_model_for_kbit_training`: it would cast embeddings, head and norms to float32."""
    import torch
    from peft import get_peft_model

    from qlora_train.data.loader import collate

    model = get_peft_model(quantised_base(options), lora_config(options))
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def train(rows: Rows, turns: Turns) -> None:
        start_adapter(model)
        model.train()
        optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
        for step in rows.steps:
            turns.begin()
            batch = collate(rows.table, [step], rows.pad_token_id, packed=True).to(torch.device(options.device))
            loss = model(input_ids=batch.input_ids, position_ids=batch.position_ids, labels=batch.labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            turns.end(float(loss.detach()))

    settings = {
        "base": "nf4, double quantisation",
        "adapter": str(parameters[0].dtype).removeprefix("torch."),
        "attention": f"{model.config._attn_implementation}, rows told apart by position_ids",
        "checkpointing": "full, non-reentrant",
        "micro-batch": f"1 pack of {options.seq_len} tokens",
        "loss": "the model's own",
    }
    return Loaded(model, model.get_base_model().model, settings, train, lambda rows: 1)
