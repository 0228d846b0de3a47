"""llama.cpp's own HTTP server, from the wheel `xllamacpp`, in a process of its own; and a client for it.

A file that llama.cpp does not like ends the process that loads it, so that is never ours.

    with LlamaServer(Path("model-F16.gguf")) as server:
        server.tokenize("Hello"), server.greedy([1, 2, 3], 16)
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

AVAILABLE = importlib.util.find_spec("xllamacpp") is not None
START_S = 120
_ANSWER_S = 300


class ServerFault(Exception):
    """The server did not start, or refused a request."""


class Server(ABC):
    """A process that is ended by `close` or on leaving a `with` block."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """End the process."""


class LlamaServer(Server):
    """A server of one model, with an adapter if one is given."""

    def __init__(
        self,
        model: Path,
        *,
        lora: Path | None = None,
        context: int = 2048,
        threads: int = 1,
        exact: bool = False,
    ) -> None:
        """`exact` keeps keys and values in float32, to compare logits; servers keep them in float16."""
        settings = {"model": str(model), "lora": str(lora) if lora else None, "context": context}
        settings |= {"threads": threads, "exact": exact}
        # A file, as a pipe that nobody reads fills up and stops the server.
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            address = self._wait_for_address()
            if address is None:
                errors.seek(0)
                why = errors.read().strip()[-2000:]
                raise ServerFault(f"llama.cpp does not load {model}, or not within {START_S} s: {why}")
        self.address = address

    def _wait_for_address(self) -> str | None:
        """Where the server listens; None, and the process ended, where it is not up within START_S."""
        assert self._process.stdout is not None
        timer = threading.Timer(START_S, self._process.kill)
        timer.start()
        try:
            # llama.cpp writes to the same stream before it is up.
            for line in self._process.stdout:
                if line.startswith(_READY):
                    return line.removeprefix(_READY).strip()
        finally:
            timer.cancel()
        self.close()
        return None

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Ids of a text; `parse_special` reads the text of special tokens as those tokens."""
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return [int(number) for number in self._post("/tokenize", body)["tokens"]]

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """A conversation as the chat template writes it, waiting for its answer."""
        body: dict[str, Any] = {"messages": list(messages)} | ({"tools": list(tools)} if tools else {})
        return str(self._post("/apply-template", body)["prompt"])

    def greedy(self, ids: Sequence[int], num_tokens: int) -> list[int]:
        """The most likely continuation, without the token that ended it."""
        body = {"prompt": list(ids), "n_predict": num_tokens, "return_tokens": True, **_GREEDY}
        found = self._post("/completion", body)
        tokens = [int(number) for number in found["tokens"]]
        return tokens[:-1] if found["stop_type"] == "eos" else tokens

    def log_probabilities(self, ids: Sequence[int], vocab_size: int) -> list[float]:
        """Of every token to come next, in nats, before any sampling."""
        # The server tells nothing of a token that ends the text or is a part of a character: let it draw a letter.
        letter = self.tokenize("a")[-1]
        body = {"prompt": list(ids), "n_predict": 1, "n_probs": vocab_size, "logit_bias": [[letter, 1e4]], **_GREEDY}
        found = self._post("/completion", body)["completion_probabilities"][0]["top_logprobs"]
        values = [float("-inf")] * vocab_size
        for entry in found:
            values[entry["id"]] = entry["logprob"]
        return values

    def chat(self, messages: Sequence[Mapping[str, Any]], num_tokens: int) -> str:
        """An answer by the OpenAI-compatible route, as users ask for it."""
        body = {"messages": list(messages), "max_tokens": num_tokens, "temperature": 0.0}
        return str(self._post("/v1/chat/completions", body)["choices"][0]["message"]["content"])

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return post(self.address, path, body)


def post(address: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a request, in JSON. ServerFault where the server refuses it or is gone."""
    request = urllib.request.Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        raise ServerFault(f"{path}: {error.read().decode(errors='replace')[:500]}") from error
    except OSError as error:
        raise ServerFault(f"{path}: the server is gone ({error})") from error


_GREEDY: dict[str, Any] = {"temperature": -1.0, "cache_prompt": False}
_READY = "listening on "


def _serve(settings: Mapping[str, Any]) -> None:
    """The child: load, say where, and wait until the parent closes our input."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.n_ctx, params.n_parallel, params.port = settings["context"], 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    params.warmup = params.fit_params = False
    params.check_tensors = True
    params.verbosity = 1
    if settings["exact"]:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if settings["lora"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(settings["lora"], 1.0)]
    server = xllamacpp.Server(params)
    sys.stdout.write(f"\n{_READY}{server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
