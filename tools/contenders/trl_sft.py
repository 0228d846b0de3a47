"""TRL's SFTTrainer with PEFT and bitsandbytes: `trainer.train()` itself, padded as documented, or packed."""

from __future__ import annotations

import tempfile
from typing import Any

from contenders.job import PADDED_ROWS, Options, Rows, recipe_of, start_adapter
from contenders.peft_loop import lora_config, quantised_base
from contenders.worker import Loaded, Turns


def load(options: Options, variant: str) -> Loaded:
    """`variant` is `padded` or `packed`. A trainer is made for each set, over the same model."""
    import transformers
    import trl.trainer.utils  # noqa: F401  else imported within the first backward pass
    from peft import get_peft_model

    transformers.utils.logging.disable_progress_bar()
    model = get_peft_model(quantised_base(options), lora_config(options))
    packing = variant == "packed"

    def num_micro_batches(rows: Rows) -> int:
        return 1 if packing else len(rows.steps[0]) // PADDED_ROWS

    def train(rows: Rows, turns: Turns) -> None:
        with tempfile.TemporaryDirectory() as folder:
            trainer = _trainer(model, rows, turns, options, folder, packing, num_micro_batches(rows))
            start_adapter(model)
            trainer.train()

    settings = {
        "base": "nf4, double quantisation",
        "adapter": "bfloat16 (TRL's cast)",
        "attention": f"{model.config._attn_implementation}" + (", padding-free" if packing else ", padding mask"),
        "checkpointing": "full, non-reentrant (TRL's default)",
        "micro-batch": f"1 pack of {options.seq_len} tokens (bfd)" if packing else f"{PADDED_ROWS} rows (the default)",
        "loss": "TRL's fused head",
        "precision": "bf16 autocast (TRL's default)",
    }
    return Loaded(model, model.get_base_model().model, settings, train, num_micro_batches)


def _trainer(
    model: Any, rows: Rows, turns: Turns, options: Options, folder: str, packing: bool, accumulated: int
) -> Any:
    from transformers import AutoTokenizer, PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from qlora_train.model.source import resolve_source

    config = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=1 if packing else PADDED_ROWS,
        gradient_accumulation_steps=accumulated,
        packing=packing,
        max_length=options.seq_len,
        dataset_kwargs={"skip_prepare_dataset": packing},
        max_steps=len(rows.steps),
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=options.device == "cpu",
        dataloader_pin_memory=False,
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=_dataset(rows, options.seq_len, packing),
        processing_class=AutoTokenizer.from_pretrained(
            str(resolve_source(recipe_of("shell", options).model, weights=False).folder)
        ),
        callbacks=[_turn_taker(turns, len(rows.steps))],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _dataset(rows: Rows, seq_len: int, packing: bool) -> Any:
    """The rows of all steps, in order. Packed by TRL's own function, step by step, so that the packs are ours."""
    from datasets import Dataset, concatenate_datasets
    from trl import pack_dataset

    from qlora_train.data.loader import collate

    def dataset(step: tuple[int, ...]) -> Any:
        batches = [collate(rows.table, [[row]], rows.pad_token_id) for row in step]
        columns = {
            "input_ids": [batch.input_ids[0].tolist() for batch in batches],
            "labels": [batch.labels[0].tolist() for batch in batches],
        }
        return Dataset.from_dict(columns)

    steps = [dataset(step) for step in rows.steps]
    if packing:
        steps = [pack_dataset(step, seq_len, "bfd") for step in steps]
        assert all(len(step) == 1 for step in steps)
    return concatenate_datasets(steps)


def _turn_taker(turns: Turns, num_steps: int) -> Any:
    """A step ends where its loss is logged, the last thing that the trainer does in it."""
    from transformers import TrainerCallback

    class TurnTaker(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turns.begin()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" not in logs:
                return  # the summary at the end of training
            turns.end(logs["loss"])
            if state.global_step < num_steps:
                turns.begin()

    return TurnTaker()
