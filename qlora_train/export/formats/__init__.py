"""What people serve: GGUF, plain LoRA, 4-bit weights; each written as a stream, read back, and measured."""
