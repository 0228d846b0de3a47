"""What a served model must show, client by client: the ids of training, its chat template, its greedy answers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_train.data.parity import GOLDEN_FILE, Golden
from serving.llama_cpp import AVAILABLE, LlamaServer

Greedy = Callable[[Sequence[int], int], list[int]]
LEAST_EQUAL = 0.95  # of the prompts' greedy answers, token for token
NUM_TOKENS = 16


@dataclass(frozen=True)
class Check:
    """So many of so many prompts as they have to be; `of` 0: nothing to compare, or no client to compare with."""

    client: str
    what: str
    equal: int
    of: int
    least_frac: float = 1.0
    note: str = ""

    @property
    def skipped(self) -> bool:
        """Whether nothing was measured."""
        return self.of == 0

    @property
    def ok(self) -> bool:
        """Whether enough are equal. What was skipped is not ok, and not failed."""
        return not self.skipped and self.equal >= self.least_frac * self.of


def read_golden(folder: Path) -> list[Golden]:
    """The prompts that lie beside a model; none where there is no such file."""
    path = folder / GOLDEN_FILE
    prompts: list[Golden] = json.loads(path.read_text(encoding="utf-8"))["prompts"] if path.is_file() else []
    return prompts


def is_served_alike(prompt: Golden) -> bool:
    """Whether a server reads the prompt's text as training did: none of them writes special tokens as text."""
    return not prompt.get("special_text", False)


def asks(prompt: Golden) -> bool:
    """Whether the prompt waits for an answer that can be compared."""
    return is_served_alike(prompt) and prompt.get("generation_prompt", True)


def check_llama_cpp(model: Path, golden: Sequence[Golden], greedy: Greedy, *, bos: str = "") -> list[Check]:
    """A GGUF file in llama.cpp's HTTP server, against `greedy` of the same prompts. `bos`: what it puts in front."""
    client = "llama.cpp"
    if not AVAILABLE:
        return [Check(client, "everything", 0, 0, note="xllamacpp is not installed")]
    alike = [prompt for prompt in golden if is_served_alike(prompt)]
    chats = [prompt for prompt in alike if prompt.get("generation_prompt") and not prompt.get("tools")]
    asked = [prompt for prompt in alike if asks(prompt)]
    left_out = f"{len(golden) - len(alike)} with special tokens as text left out" if len(alike) < len(golden) else ""
    with LlamaServer(model, context=_context(golden)) as server:
        ids = sum(_tokenized(server, prompt) == prompt["ids"] for prompt in alike)
        texts = sum(bos + server.render(prompt["messages"]).removeprefix(bos) == prompt["text"] for prompt in chats)
        answers = sum(server.greedy(prompt["ids"], NUM_TOKENS) == greedy(prompt["ids"], NUM_TOKENS) for prompt in asked)
    return [
        Check(client, "ids of the prompts' texts", ids, len(alike), note=left_out),
        Check(client, "texts of the chat template", texts, len(chats)),
        Check(client, f"greedy answers of {NUM_TOKENS} tokens", answers, len(asked), LEAST_EQUAL),
    ]


def _tokenized(server: LlamaServer, prompt: Golden) -> list[int]:
    """A rendered conversation holds its special tokens; a plain prompt gets them from the server."""
    return server.tokenize(prompt["text"], add_special=bool(prompt.get("add_special_tokens", False)))


def _context(golden: Sequence[Golden]) -> int:
    longest = max((len(prompt["ids"]) for prompt in golden), default=0)
    return max(256, 1 << (longest + NUM_TOKENS).bit_length())


def check_transformers(folder: Path, golden: Sequence[Golden], greedy: Greedy) -> list[Check]:
    """A folder that `from_pretrained` loads, 4-bit or not, as its users load it."""
    import torch
    from transformers import AutoModelForCausalLM

    method = _quantisation(folder)
    if method == "compressed-tensors" and importlib.util.find_spec("compressed_tensors") is None:
        return [Check("transformers", "everything", 0, 0, note="compressed-tensors is not installed")]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    own = transformers_greedy(model)
    asked = [prompt for prompt in golden if asks(prompt)]
    equal = sum(own(prompt["ids"], NUM_TOKENS) == greedy(prompt["ids"], NUM_TOKENS) for prompt in asked)
    return [Check("transformers", f"greedy answers of {NUM_TOKENS} tokens", equal, len(asked), LEAST_EQUAL, method)]


def check_vllm(folder: Path, linear_names: Sequence[str]) -> list[Check]:
    """vLLM's rules for an adapter; vLLM itself where it is installed (on a machine that it runs on)."""
    from qlora_train.export.formats.lora import vllm_problems

    problems = vllm_problems(folder, linear_names)
    rules = Check("vLLM", "its rules for adapters", int(not problems), 1, note="; ".join(problems[:2]))
    if importlib.util.find_spec("vllm") is None:
        return [rules, Check("vLLM", "loads it", 0, 0, note="vLLM is not installed")]
    from vllm.lora.peft_helper import PEFTHelper  # type: ignore[import-not-found]

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    helper = PEFTHelper.from_dict(config)
    return [rules, Check("vLLM", "reads its config", int(helper.r == config["r"]), 1)]


def transformers_greedy(model: Any) -> Greedy:
    """The most likely continuation by transformers, without the token that ends it."""
    import torch

    ends = model.generation_config.eos_token_id
    stop = {*(ends if isinstance(ends, list) else [ends])}

    def greedy(ids: Sequence[int], num_tokens: int) -> list[int]:
        given = torch.tensor([list(ids)], device=model.device)
        with torch.inference_mode():
            made = model.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=num_tokens,
                do_sample=False,
                use_cache=True,
                # A model's own generation config may ask for these, and no server was told.
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
            )
        answer: list[int] = made[0, len(ids) :].tolist()
        return answer[:-1] if answer and answer[-1] in stop else answer

    return greedy


def _quantisation(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config.get("quantization_config", {}).get("quant_method", ""))
