"""What a run ran on: versions, device, threads. For run folders and for bug reports."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "transformers",
    "bitsandbytes",
    "peft",
    "accelerate",
    "safetensors",
    "tokenizers",
    "jinja2",
    "datasets",
    "pyarrow",
    "numpy",
    "pydantic",
)
# Instructions of a processor with which a library may compute, and round, in another way.
_ARITHMETIC = ("avx", "amx", "fma", "f16c", "neon", "sve", "sme", "bf16", "fp16", "i8mm", "dot", "fhm")


def versions() -> dict[str, str]:
    """Installed versions of this project and of the libraries that decide what a run computes."""
    found = {}
    for package in ("qlora-train", *PACKAGES):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def code_sha256(part: str = "") -> str:
    """One hash over this package's own source files, or over those of one part of it: what exactly ran."""
    folder = Path(__file__).resolve().parent / part
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """Versions, processor, threads, CUDA devices and the hash of our code; no names of users, hosts or folders."""
    import torch

    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_features": {
            name: value
            for name, value in sorted(torch.cpu.get_capabilities().items())
            if name.startswith(_ARITHMETIC) and value
        },
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if cuda else None,
        "cuda_devices": cuda,
        "versions": versions(),
        "code_sha256": code_sha256(),
    }


def _cpu_name() -> str:
    """As the processor calls itself: libraries choose their code, and with it the order of sums, by its maker too."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor()


def processor_text(found: Mapping[str, Any]) -> str:
    """The processor of an `environment()`, in brief.

    >>> processor_text({"cpu": "A CPU", "cpu_count": 2, "cpu_capability": "AVX512", "cpu_features": {"amx_bf16": True}})
    '2 cores of A CPU (AVX512, AMX)'
    """
    units = ", AMX" if found.get("cpu_features", {}).get("amx_bf16") else ""
    return f"{found['cpu_count']} cores of {found.get('cpu') or 'a CPU'} ({found['cpu_capability']}{units})"
