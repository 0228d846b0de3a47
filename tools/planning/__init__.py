"""The memory plan held against what others published, against the QLoRA paper, and against this machine."""
