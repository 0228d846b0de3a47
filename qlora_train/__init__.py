"""QLoRA fine-tuning with evidence. Import from the modules: `from qlora_train.api import train`."""

__version__ = "0.1.0"
