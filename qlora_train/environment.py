"""What a run ran on: versions, device, threads. For run folders and for bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

PACKAGES = (
    "torch",
    "transformers",
    "bitsandbytes",
    "peft",
    "accelerate",
    "safetensors",
    "tokenizers",
    "numpy",
    "pydantic",
)


def versions() -> dict[str, str]:
    """Installed versions of this project and of the libraries that decide what a run computes."""
    found = {}
    for package in ("qlora-train", *PACKAGES):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def environment() -> dict[str, Any]:
    """Versions, processor, threads and CUDA devices; no names of users, hosts or folders."""
    import torch

    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if cuda else None,
        "cuda_devices": cuda,
        "versions": versions(),
    }
