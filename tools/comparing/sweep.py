"""The whole comparison, run by run: rates, finals, cost, a second set. What the ledger has is not made again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from comparing.cost import Side, measure_cost, release
from comparing.entrants import REFERENCE, VERDICT, Entrant, entrants
from comparing.ledger import Entry, Ledger
from comparing.rates import best_rate, is_inside, next_rate
from comparing.trial import WORK, Failed, Scale, Stage, Trial, crash_text, run_trial

Say = Callable[[str], None]


@dataclass(frozen=True)
class Compared:
    """What is known of one entrant; None and empty where it is still to be measured."""

    entrant: Entrant
    rates: dict[float, float]  # tried -> loss on the rows to choose by; infinite where it diverged
    finals: tuple[Entry, ...]  # one for each seed
    spelling: Entry | None
    cost: Entry | None

    def entries(self) -> list[Entry]:
        """The runs of its row."""
        return [*self.trained(), *filter(None, (self.cost,))]

    def trained(self) -> list[Entry]:
        """Those that losses and scores are of."""
        return [*self.finals, *filter(None, (self.spelling,))]

    @property
    def rate(self) -> float:
        """The best rate tried; the first guess where none was."""
        return best_rate(self.rates) or self.entrant.first_rate

    @property
    def rate_is_inside(self) -> bool:
        """Whether worse rates were seen on both sides."""
        return is_inside(self.rates)


class Sweep:
    """Asks for runs one after the other. `make_missing` False: only reads what the ledger has."""

    def __init__(
        self,
        ledger: Ledger,
        scale: Scale,
        *,
        threads: int,
        limit_s: float,
        say: Say,
        make_missing: bool = True,
        work: Path = WORK,
        shared: Sequence[str] = (),
    ) -> None:
        self._ledger, self._scale, self._threads = ledger, scale, threads
        self._limit_s, self._say, self._make_missing = limit_s, say, make_missing
        self._work, self._shared = work, tuple(shared)
        self._reference: Side | None = None
        self.used: list[Entry] = []  # what the ledger had, or what was made, in the order of asking

    def compare(self, names: Sequence[str], stages: Sequence[str]) -> list[Compared]:
        """Every entrant of these names: a stage for all, then the next one, so that early figures compare."""
        known = entrants()
        found = [Compared(known[name], {}, (), None, None) for name in names]
        found = [replace(each, rates=self.search(each.entrant) if "search" in stages else {}) for each in found]
        if "final" in stages:
            found = [replace(each, finals=self._finals(each)) for each in found]
        if "cost" in stages:
            found = [replace(each, cost=self._cost(each)) for each in found]
            self._reference = None
        if "spelling" in stages:
            found = [
                replace(each, spelling=self._spelling(each)) if each.entrant.name in VERDICT else each for each in found
            ]
        return found

    def trial(self, stage: Stage, entrant: Entrant, rate: float, seed: int = 0, **more: Any) -> Trial:
        """A run with the settings of this sweep."""
        return Trial(
            stage, entrant, rate, seed, self._scale, self._threads, work=self._work, shared=self._shared, **more
        )

    def run(self, trial: Trial) -> Entry | None:
        """What the ledger has of a run, or what it comes to now."""
        settings = trial.settings()
        entry = self._ledger.find(settings)
        if self._make_missing and (entry is None or not entry.is_settled):
            entry = self._make(trial, settings)
        if entry is not None:
            self.used.append(entry)
        return entry

    def _make(self, trial: Trial, settings: dict[str, Any]) -> Entry:
        try:
            result = run_trial(self._with_experts(trial), limit_s=self._limit_s)
        except Failed as failure:
            self._say(f"{trial.name}: {failure}")
            return self._ledger.add(settings, failed=str(failure))
        self._say(f"{trial.name}: loss {result['loss']:.4f} in {result['wall_s']:.0f} s")
        return self._ledger.add(settings, result=result)

    def search(self, entrant: Entrant) -> dict[float, float]:
        """Losses by rate, infinite where it diverged: from the first guess on until the best is inside the grid."""
        losses: dict[float, float] = {}
        while (rate := next_rate(losses, entrant.first_rate)) is not None:
            entry = self.run(self.trial("search", entrant, rate))
            if entry is None:
                break
            if entry.failed is not None and not entry.failed.startswith("diverged"):
                break
            losses[rate] = math.inf if entry.result is None else float(entry.result["loss"])
        return losses

    def _finals(self, each: Compared) -> tuple[Entry, ...]:
        found = (self.run(self.trial("final", each.entrant, each.rate, seed)) for seed in self._scale.seeds)
        return tuple(entry for entry in found if entry is not None)

    def _spelling(self, each: Compared) -> Entry | None:
        return self.run(self.trial("spelling", each.entrant, each.rate))

    def _cost(self, each: Compared) -> Entry | None:
        if each.entrant.name == REFERENCE:
            return None
        trial = self.trial("final", each.entrant, each.rate)
        settings = {**trial.settings(), "stage": "cost", "learning_rate": None}
        known = self._ledger.find(settings)
        if not self._make_missing or (known is not None and known.is_settled):
            return known
        try:
            if self._reference is None:
                reference = entrants()[REFERENCE]
                self._reference = Side(self.trial("final", reference, reference.first_rate))
            cost = measure_cost(Side(self._with_experts(trial)), self._reference)
        except Failed as failure:
            return self._ledger.add(settings, failed=str(failure))
        except Exception as error:  # of one method: the others are still compared, and the table says so
            return self._ledger.add(settings, failed=crash_text(error))
        finally:
            release()
        self._say(f"cost of {each.entrant.name}: {cost.time_ratio:.2f} of LoRA's step")
        return self._ledger.add(settings, result=cost.as_dict())

    def _with_experts(self, trial: Trial) -> Trial:
        """With the adapters that a router weighs: LoRA on either half of the rows, at LoRA's first rate.

        Those of a search have seen none of the rows that a rate is chosen by. Failed where one cannot be trained.
        """
        if not trial.entrant.needs_experts:
            return trial
        lora = entrants()[REFERENCE]
        folders = []
        for half in (0, 1):
            expert = self.trial("expert", lora, lora.first_rate, half=half, for_search=trial.stage == "search")
            folder = expert.run_dir / "adapter"
            if not folder.is_dir() or self._ledger.find(expert.settings()) is None:
                result = run_trial(expert, limit_s=self._limit_s)
                self._ledger.add(expert.settings(), result=result)
                self._say(f"{expert.name}: loss {result['loss']:.4f}")
            folders.append(folder)
        return replace(trial, experts=tuple(folders))
