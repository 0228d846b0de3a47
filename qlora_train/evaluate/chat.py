"""Talking to a model: streamed replies, several adapters on one loaded base."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import TextIteratorStreamer

from qlora_train.adapters.attach import ADAPTER_NAME, check_attached
from qlora_train.adapters.inits.residual import untrained
from qlora_train.adapters.layers import register_layers
from qlora_train.adapters.state import describe_mismatch, load_adapter_config, read_adapter_tensors
from qlora_train.data.encode import Encoder
from qlora_train.data.problems import RowFault
from qlora_train.data.rows import Message
from qlora_train.data.template import Renderer
from qlora_train.errors import ModelError
from qlora_train.evaluate.tasks import GREEDY, end_token_ids, padded_left, sampled

BASE = "base"


class ChatSession:
    """One loaded model and one conversation. `active` names the adapter that answers, or `base`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        system: str | None = None,
        name: str = "adapter",
        conversations: bool = True,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._system = system
        # A model that was trained on plain prompts is given plain prompts.
        self._plain = not conversations or tokenizer.chat_template is None
        # Adapters go by the names of their runs here. PEFT's names are keys of an nn.ModuleDict, which takes neither
        # a dot nor the name of an attribute of a module (`train`).
        self.adapters = {f"{name}-run" if name == BASE else name: ADAPTER_NAME} if isinstance(model, PeftModel) else {}
        name = next(iter(self.adapters), BASE)
        self.active = name
        self.messages: list[dict[str, str]] = []
        self.clear()
        model.eval()

    def clear(self) -> None:
        """Forget the conversation but not the system prompt."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def add_adapter(self, name: str, folder: Path) -> None:
        """Load one more adapter onto the same base."""
        if not isinstance(self.model, PeftModel):
            raise ModelError("a merged model takes no adapter", fix="chat with a run folder instead")
        if name in self.adapters or name == BASE:
            raise ModelError(f"an adapter cannot be named {name!r} here", fix="rename that run folder")
        config, tensors = load_adapter_config(folder), read_adapter_tensors(folder)
        inner = f"further{len(self.adapters)}"
        self.model.add_adapter(inner, register_layers(config))
        own = get_peft_model_state_dict(self.model, adapter_name=inner, save_embedding_layers=False)
        if problems := describe_mismatch(own, tensors):
            raise ModelError(f"{folder}: {problems}", fix="use the base it was trained on")
        set_peft_model_state_dict(self.model, tensors, adapter_name=inner)
        check_attached(self.model)
        self.adapters[name] = inner

    def switch(self, name: str) -> None:
        """Let another adapter, or the base, answer from now on."""
        if name != BASE and name not in self.adapters:
            known = ", ".join([*self.adapters, BASE])
            raise ModelError(f"no adapter {name!r}; there is: {known}", fix="name one of these")
        if name != BASE:
            self.model.set_adapter(self.adapters[name])
        self.active = name

    def reply(self, text: str, *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0) -> Generator[str]:
        """Add the user's turn, yield the answer piece by piece, and add it to the conversation.

        Closing the iterator, or an interrupt, ends the answer at its next token; what was said so far stays.
        """
        said = {"role": "user", "content": text}
        prompt_ids = self.prompt_ids([*self.messages, said])
        self.messages.append(said)
        pieces = []
        try:
            for piece in self._generate(prompt_ids, max_new_tokens, temperature, seed):
                pieces.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(pieces).strip()})

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """What the model is given to answer a conversation: as in training, so special-token text is text."""
        try:
            with Renderer(self.tokenizer, "completion") as renderer:
                if self._plain:
                    text = "\n".join(message["content"] for message in messages)
                    prompt = renderer.verbatim_prompt(text)
                else:
                    prompt = renderer.prompt(messages)
            return self._encoder.ids(prompt)
        except RowFault as fault:
            raise fault.error(fault.what, fix=fault.fix) from fault

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer)

    def _generate(self, prompt_ids: list[int], max_new_tokens: int, temperature: float, seed: int) -> Generator[str]:
        inputs = padded_left([prompt_ids], self.tokenizer.pad_token_id, self.model.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling = sampled(temperature) if temperature > 0 else GREEDY
        failure: list[BaseException] = []
        stop = threading.Event()

        def is_stopped(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.full((len(input_ids),), stop.is_set(), device=input_ids.device)

        def work() -> None:
            try:
                with torch.inference_mode(), self._without_adapter():
                    torch.manual_seed(seed)
                    self.model.generate(
                        **inputs,
                        **sampling,
                        max_new_tokens=max_new_tokens,
                        use_cache=True,
                        streamer=streamer,
                        stopping_criteria=[is_stopped],
                        pad_token_id=self.tokenizer.pad_token_id,
                        eos_token_id=end_token_ids(self.model, self.tokenizer),
                    )
            except BaseException as error:  # shown by the reader's thread, which waits for the streamer's end
                failure.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            stop.set()
            thread.join()
        if failure:
            raise failure[0]

    def _without_adapter(self) -> AbstractContextManager[Any]:
        if self.active == BASE and isinstance(self.model, PeftModel):
            return untrained(self.model)
        return nullcontext()
