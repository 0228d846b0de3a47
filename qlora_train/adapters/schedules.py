"""What a method changes in the course of training: AdaLoRA's ranks, AFLoRA's frozen projections, MoLE's balance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from peft.tuners.lora.variants import _register_frozen_peft_weight
from torch import Tensor, nn

from qlora_train.adapters.forms.base import FACTORS, layer_tensors
from qlora_train.adapters.hooks import NO_HOOKS, MethodHooks, Value
from qlora_train.adapters.layers import lora_layers
from qlora_train.recipe.methods import METHODS
from qlora_train.recipe.schema import AdapterSection

ADAPTER = "default"


def method_hooks(model: nn.Module, section: AdapterSection, *, num_steps: int, seed: int) -> MethodHooks:
    """What the recipe's method does around each of `num_steps` steps."""
    match METHODS[section.method].schedule:
        case "rank budget":
            return RankAllocator(model, section, num_steps)
        case "freezing":
            return Freezer(model, section, num_steps)
        case "balance":
            return Balance(model, section)
    return NO_HOOKS


@dataclass(frozen=True)
class Window:
    """The part of a run in which a schedule acts, in steps from 1: after `first`, up to and with `last`."""

    first: int
    last: int
    every: int

    @classmethod
    def of(cls, section: AdapterSection, num_steps: int) -> Window:
        """From the recipe's shares: the first and the last steps of the run are left in peace."""
        first = math.floor(section.schedule_start_frac * num_steps)
        last = max(first + 1, num_steps - math.floor(section.schedule_end_frac * num_steps))
        return cls(first, last, section.schedule_every)

    def remaining(self, step: int) -> float:
        """(1 - progress)^3: one up to `first`, zero from `last` on.

        >>> [Window(2, 6, 1).remaining(step) for step in (2, 4, 6, 9)]
        [1.0, 0.125, 0.0, 0.0]
        """
        progress = (step - self.first) / (self.last - self.first)
        return (1 - min(max(progress, 0.0), 1.0)) ** 3

    def acts(self, step: int) -> bool:
        """Whether something is decided after `step`: each `every` steps inside the window, and at its end."""
        return step == self.last or (self.first < step < self.last and step % self.every == 0)


class RankAllocator(MethodHooks):
    """AdaLoRA (arXiv 2303.10512): the triplets of least importance lose their singular value, up to a budget.

        I = |w dw|,   I' <- b I' + (1 - b) I,   U' <- b U' + (1 - b) |I - I'|,   s = I' U',   b = 0.85
        of a triplet: s(E_i) + mean_j s(P_ji) + mean_j s(Q_ij)
        budget(t) = target + (start - target) * (1 - progress)^3, in triplets of the whole model

    Between two decisions a singular value may come back; from the end of the window on the last choice is held. The
    loss has the orthogonality penalty, `weight * mean ||Q Q^T - I||_F` over all P^T and Q. PEFT's allocator makes the
    same choices from the same gradients (tests/methods/test_adalora.py), but leaves calling it to the user. Memory: two
    float32 values for each parameter until the end of the window.
    """

    BETA = 0.85

    def __init__(self, model: nn.Module, section: AdapterSection, num_steps: int) -> None:
        assert section.target_r is not None
        self.window = Window.of(section, num_steps)
        self.weight = section.orthogonality
        self.layers = lora_layers(model)
        self.start, self.target = section.r * len(self.layers), section.target_r * len(self.layers)
        self.importance: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}  # (r,) of each layer, from the end of the window on

    def budget(self, step: int) -> int:
        """Triplets that the model may have after `step` (from 1)."""
        return int(self.target + (self.start - self.target) * self.window.remaining(step))

    def extra_loss(self, share: float) -> Tensor | None:
        """The penalty on factors that are not orthonormal."""
        if not self.weight:
            return None
        terms = []
        for _, tensors in self._tensors():
            for rows in (tensors["lora_A"], tensors["lora_B"].T):
                terms.append((rows @ rows.T - torch.eye(len(rows), device=rows.device)).norm())
        return share * self.weight * torch.stack(terms).mean()

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Measure, and decide where it is time."""
        now = step + 1
        if now <= self.window.last and not self.kept:
            self._measure()
        if self.window.acts(now):
            kept = self._choose(self.budget(now))
            if now == self.window.last:
                self.kept = kept
                self.importance, self.uncertainty = {}, {}
            self._hold(kept)
        elif self.kept:
            self._hold(self.kept)

    def figures(self) -> Mapping[str, float]:
        """Triplets left, of all layers."""
        left = sum(int(tensors["lora_core_e"].count_nonzero()) for _, tensors in self._tensors())
        return {"num_triplets": left}

    def state_dict(self) -> Mapping[str, Value]:
        """The two averages, or the choice that is held."""
        parts = {"importance": self.importance, "uncertainty": self.uncertainty, "kept": self.kept}
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def load_state_dict(self, state: Mapping[str, Value]) -> None:
        """Put them back."""
        parts = {"importance": self.importance, "uncertainty": self.uncertainty, "kept": self.kept}
        for tensors in parts.values():
            tensors.clear()
        for key, value in state.items():
            part, _, name = key.partition("/")
            if part not in parts or not isinstance(value, Tensor):
                raise ValueError(f"AdaLoRA keeps no {key}")
            parts[part][name] = value.to(self._device())

    def _tensors(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, layer in self.layers.items():
            yield name, layer_tensors(layer, ADAPTER)

    def _device(self) -> torch.device:
        return next(self._tensors())[1]["lora_A"].device

    @torch.no_grad()
    def _measure(self) -> None:
        for name, tensors in self._tensors():
            for attribute, tensor in tensors.items():
                if tensor.grad is None:  # an expert that no token reached
                    continue
                key = f"{name}.{attribute}"
                seen = (tensor * tensor.grad).abs()
                mean = self.importance.setdefault(key, torch.zeros_like(seen))
                mean.mul_(self.BETA).add_(seen, alpha=1 - self.BETA)
                spread = self.uncertainty.setdefault(key, torch.zeros_like(seen))
                spread.mul_(self.BETA).add_((seen - mean).abs_(), alpha=1 - self.BETA)

    def _score(self, name: str, attribute: str, like: Tensor) -> Tensor:
        key = f"{name}.{attribute}"
        if key not in self.importance:
            return torch.zeros_like(like)
        return self.importance[key] * self.uncertainty[key]

    @torch.no_grad()
    def _choose(self, budget: int) -> dict[str, Tensor]:
        """Which triplets of each layer stay (r,): the `budget` best of the model, ties with the last one left out."""
        scores = {}
        for name, tensors in self._tensors():
            of = {attribute: self._score(name, attribute, tensor) for attribute, tensor in tensors.items()}
            scores[name] = of["lora_core_e"] + of["lora_A"].mean(dim=1) + of["lora_B"].mean(dim=0)
        num_dropped = self.start - budget
        if num_dropped == 0:
            return {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
        threshold = torch.cat(list(scores.values())).kthvalue(num_dropped).values
        return {name: score > threshold for name, score in scores.items()}

    @torch.no_grad()
    def _hold(self, kept: Mapping[str, Tensor]) -> None:
        for name, tensors in self._tensors():
            tensors["lora_core_e"].mul_(kept[name])


class Freezer(MethodHooks):
    """AFLoRA (arXiv 2403.13269): A and B are frozen for good, one tensor after the other, the least important first.

        I = |g|, its mean over the steps since the last decision;   score = mean(I' U') of a tensor,
        I' <- 0.85 I' + 0.15 I,   U' <- 0.95 U' + 0.05 |I - I'|

    The share of A and B that may train falls from one to zero as (1 - progress)^3. Two rules read it. `rank`, the
    default: the lowest-scored tensors are frozen until the share of elements left is not above it. `reference`, as the
    authors' program: a tensor is frozen when its mean score is below the quantile (1 - share) of the score elements of
    the tensors still trained; that compounds, and compares a mean with a quantile of heavy-tailed values.
    Frozen tensors lose gradient, moments and averages. d and b always train.
    """

    BETAS = (0.85, 0.95)

    def __init__(self, model: nn.Module, section: AdapterSection, num_steps: int) -> None:
        self.window = Window.of(section, num_steps)
        self.rule = section.freeze_rule
        self.layers = lora_layers(model)
        self.total = sum(tensor.numel() for tensor in self._trained().values())
        self.num_seen = 0
        self.seen: dict[str, Tensor] = {}
        self.importance: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}
        self.frozen: list[str] = []

    def before_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Measure, and freeze where it is time: what is frozen now takes no part in this update."""
        now = step + 1
        if not self._trained():
            return
        self._measure()
        if self.window.acts(now) or now > self.window.last:
            self._close_window()
            for key in self._choose(self.window.remaining(now)):
                self._freeze(key, optimizer)
        elif now % self.window.every == 0:
            self._close_window()

    def figures(self) -> Mapping[str, float]:
        """How many tensors are frozen, and which share of the elements of A and B still trains."""
        left = sum(tensor.numel() for tensor in self._trained().values())
        return {"num_frozen_tensors": len(self.frozen), "trainable_frac": left / self.total}

    def state_dict(self) -> Mapping[str, Value]:
        """Averages, what was seen since the last decision, and the names of what is frozen."""
        parts = {"seen": self.seen, "importance": self.importance, "uncertainty": self.uncertainty}
        tensors = {f"{part}/{name}": tensor for part, found in parts.items() for name, tensor in found.items()}
        return {"num_seen": self.num_seen, "frozen": list(self.frozen), **tensors}

    def load_state_dict(self, state: Mapping[str, Value]) -> None:
        """Put them back, and freeze again."""
        frozen, num_seen = state.get("frozen"), state.get("num_seen")
        if not isinstance(frozen, list) or not isinstance(num_seen, int):
            raise ValueError("AFLoRA's list of frozen tensors is missing")
        parts = {"seen": self.seen, "importance": self.importance, "uncertainty": self.uncertainty}
        for key, value in state.items():
            part, _, name = key.partition("/")
            if part in parts and isinstance(value, Tensor):
                parts[part][name] = value.to(next(iter(self.layers.values())).lora_A[ADAPTER].weight.device)
        self.num_seen = num_seen
        for key in map(str, frozen):
            if key not in self._trained():
                raise ValueError(f"AFLoRA froze {key}, which is no tensor of this adapter")
            self._freeze(key, None)

    def _trained(self) -> dict[str, Tensor]:
        """The factors that still train, by layer and attribute."""
        return {
            f"{name}/{attribute}": tensor
            for name, layer in self.layers.items()
            for attribute, tensor in layer_tensors(layer, ADAPTER).items()
            if attribute in FACTORS and tensor.requires_grad
        }

    @torch.no_grad()
    def _measure(self) -> None:
        self.num_seen += 1
        for key, tensor in self._trained().items():
            if tensor.grad is not None:
                mean = self.seen.setdefault(key, torch.zeros_like(tensor))
                mean.add_((tensor.grad.abs() - mean) / self.num_seen)

    @torch.no_grad()
    def _close_window(self) -> None:
        """Bring the averages forward by what was seen since the last time."""
        for key, seen in self.seen.items():
            mean = self.importance.setdefault(key, torch.zeros_like(seen))
            mean.mul_(self.BETAS[0]).add_(seen, alpha=1 - self.BETAS[0])
            spread = self.uncertainty.setdefault(key, torch.zeros_like(seen))
            spread.mul_(self.BETAS[1]).add_((seen - mean).abs_(), alpha=1 - self.BETAS[1])
        self.num_seen, self.seen = 0, {}

    def _choose(self, share: float) -> list[str]:
        """What is frozen now."""
        trained = self._trained()
        if share == 0:
            return list(trained)
        elements = {
            key: self.importance[key] * self.uncertainty[key] if key in self.importance else torch.zeros_like(tensor)
            for key, tensor in trained.items()
        }
        scores = {key: float(element.mean()) for key, element in elements.items()}
        if self.rule == "reference":
            pool = torch.cat([element.flatten() for element in elements.values()])
            place = int(len(pool) * (1 - share))
            threshold = float(pool.kthvalue(place).values) if place else -math.inf
            return [key for key in trained if scores[key] < threshold]
        left, chosen = sum(tensor.numel() for tensor in trained.values()), []
        for key in sorted(trained, key=lambda key: scores[key]):
            if left <= share * self.total:
                break
            chosen.append(key)
            left -= trained[key].numel()
        return chosen

    def _freeze(self, key: str, optimizer: torch.optim.Optimizer | None) -> None:
        """For good: PEFT's list of frozen weights outlives `disable_adapter`, which a bare requires_grad does not."""
        name, _, attribute = key.rpartition("/")
        tensor = self._trained()[key]
        _register_frozen_peft_weight(self.layers[name], ADAPTER, attribute)
        tensor.grad = None
        if optimizer is not None:
            optimizer.state.pop(tensor, None)
        for kept in (self.seen, self.importance, self.uncertainty):
            kept.pop(key, None)
        self.frozen.append(key)


class Balance(MethodHooks):
    """MoLE's penalty on experts that get no weight: `weight * -log prod_i q_i` (arXiv 2404.13628, section 3.3).

    q_i is an expert's mean gate over the tokens of a micro-batch and all layers: layers may prefer different experts.
    Least, N log N, where all are equal.
    """

    def __init__(self, model: nn.Module, section: AdapterSection) -> None:
        self.weight = section.balance
        self.layers = lora_layers(model)
        self.last: list[float] = []

    def extra_loss(self, share: float) -> Tensor | None:
        """Of the gates of the forward pass just made."""
        gates = [layer.__dict__.pop("mean_gates") for layer in self.layers.values() if "mean_gates" in layer.__dict__]
        if not gates:
            return None
        mean_N = torch.stack(gates).mean(dim=0)
        self.last = mean_N.tolist()
        if not self.weight:
            return None
        return share * self.weight * -mean_N.clamp_min(torch.finfo(mean_N.dtype).tiny).log().sum()

    def figures(self) -> Mapping[str, float]:
        """The mean gate of each expert."""
        return {f"gate_{index}": gate for index, gate in enumerate(self.last)}
