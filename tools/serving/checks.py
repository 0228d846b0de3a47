"""What a served model must show, client by client: the ids of training, its chat template, its greedy answers."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_train.data.parity import GOLDEN_FILE, Golden
from serving.llama_cpp import AVAILABLE, LlamaServer, ServerFault
from serving.vllm_server import Vllm, VllmServer

Greedy = Callable[[Sequence[int], int], list[int]]
Following = Callable[[Sequence[int]], list[float]]  # the logarithm of every token's probability to come next
MAX_NATS_OFF = 0.1  # of a next token, by what a client rounds as it computes: 0.04 at most in llama.cpp's Q2_K to Q6_K
LEAST_EQUAL = 0.95  # of the prompts' greedy answers, token for token
LEAST_EQUAL_16_BIT = 0.5  # where the client rounds what it computes: transformers itself in bfloat16 gave 10 of 12
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


def check_llama_cpp(
    model: Path, golden: Sequence[Golden], greedy: Greedy | None, *, bos: str = "", following: Following | None = None
) -> list[Check]:
    """A GGUF file in llama.cpp's HTTP server, against `greedy` of the same prompts. `bos`: what it puts in front.

    `following` is for a file of 8 bits or fewer, in whose layers llama.cpp rounds what goes in to 8 bits as well: its
    answers part sooner or later, and the probabilities of the next token are compared.
    """
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
        if following is not None:
            off = [_nats_off(server, prompt["ids"], following(prompt["ids"])) for prompt in asked]
            near, note = sum(nats <= MAX_NATS_OFF for nats in off), f"mean {sum(off) / max(1, len(off)):.2g}"
            last = Check(client, f"next tokens within {MAX_NATS_OFF} nats of the file's", near, len(asked), note=note)
        else:
            assert greedy is not None
            same = sum(
                server.greedy(prompt["ids"], NUM_TOKENS) == greedy(prompt["ids"], NUM_TOKENS) for prompt in asked
            )
            last = Check(client, f"greedy answers of {NUM_TOKENS} tokens", same, len(asked), LEAST_EQUAL)
    return [
        Check(client, "ids of the prompts' texts", ids, len(alike), note=left_out),
        Check(client, "texts of the chat template", texts, len(chats)),
        last,
    ]


def _nats_off(server: LlamaServer, ids: Sequence[int], expected: Sequence[float]) -> float:
    """KL of the server's next token from the one that is expected, both as natural logarithms of probabilities."""
    found = server.log_probabilities(ids, len(expected))
    return sum(math.exp(ours) * (ours - theirs) for ours, theirs in zip(expected, found, strict=True))


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

    method = quantisation(folder)
    if method == "compressed-tensors" and importlib.util.find_spec("compressed_tensors") is None:
        return [Check("transformers", "everything", 0, 0, note="compressed-tensors is not installed")]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    own = transformers_greedy(model)
    asked = [prompt for prompt in golden if asks(prompt)]
    equal = sum(own(prompt["ids"], NUM_TOKENS) == greedy(prompt["ids"], NUM_TOKENS) for prompt in asked)
    return [Check("transformers", f"greedy answers of {NUM_TOKENS} tokens", equal, len(asked), LEAST_EQUAL, method)]


NO_VLLM = Check("vLLM", "loads it", 0, 0, note="vLLM is not on PATH, and no --vllm names it")


@dataclass(frozen=True)
class Served:
    """What vLLM is given of an export: a model, with an adapter or without."""

    model: Path
    lora: Path | None = None


def check_vllm_rules(folder: Path, linear_names: Sequence[str], vllm: Vllm | None) -> list[Check]:
    """vLLM's rules for an adapter, as we know them; and by its own reader, where it is installed."""
    from qlora_train.export.formats.lora import SERVED_RANKS, vllm_problems

    problems = vllm_problems(folder, linear_names)
    checks = [Check("vLLM", "its rules for adapters", int(not problems), 1, note="; ".join(problems[:2]))]
    if vllm is not None:
        refusal = vllm.refusals([folder], SERVED_RANKS[-1])[str(folder)]
        checks.append(Check("vLLM", "reads its config", int(not refusal), 1, note=refusal or vllm.version))
    return checks


def check_vllm(vllm: Vllm, served: Served, golden: Sequence[Golden], greedy: Greedy) -> list[Check]:
    """A folder in vLLM's HTTP server, against `greedy` of the same prompts.

    On a CPU it computes in float32, where it can: what differs then is what it reads. Else as it does for its users.
    """
    in_float32 = vllm.on_cpu and not quantisation(served.model)  # its 4-bit layers take 16-bit inputs only
    dtype = "float32" if in_float32 else "auto"
    alike = [prompt for prompt in golden if is_served_alike(prompt)]
    asked = [prompt for prompt in alike if asks(prompt)]
    rank = _adapter_rank(served.lora) if served.lora else 0
    try:
        with VllmServer(
            vllm, served.model, lora=served.lora, max_lora_rank=rank, context=_context(golden), dtype=dtype
        ) as server:
            ids = sum(_ids_by_vllm(server, prompt) == prompt["ids"] for prompt in alike)
            answers = sum(
                server.greedy(prompt["ids"], NUM_TOKENS) == greedy(prompt["ids"], NUM_TOKENS) for prompt in asked
            )
    except ServerFault as fault:
        return [Check("vLLM", "loads it", 0, 1, note=str(fault))]
    least = LEAST_EQUAL if in_float32 else LEAST_EQUAL_16_BIT
    note = f"{vllm.version}, {'float32' if in_float32 else '16 bit'}"
    return [
        Check("vLLM", "ids of prompts and conversations", ids, len(alike), note=note),
        Check("vLLM", f"greedy answers of {NUM_TOKENS} tokens", answers, len(asked), least, note),
    ]


def _ids_by_vllm(server: VllmServer, prompt: Golden) -> list[int]:
    if "messages" not in prompt:
        return server.tokenize(prompt["text"], add_special=bool(prompt.get("add_special_tokens", False)))
    return server.ids_of_chat(prompt["messages"], prompt.get("tools", ()), answer=prompt["generation_prompt"])


def _adapter_rank(folder: Path) -> int:
    return int(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"])


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


def transformers_following(model: Any) -> Following:
    """What transformers expects next."""
    import torch

    def following(ids: Sequence[int]) -> list[float]:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([list(ids)])).logits[0, -1]
        found: list[float] = logits.double().log_softmax(-1).tolist()
        return found

    return following


def quantisation(folder: Path) -> str:
    """The method by which a folder's weights are quantised; "" where they are not."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config.get("quantization_config", {}).get("quant_method", ""))
