"""Measure ties, low rank and plans on one model."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from tqdm import tqdm

from tying.advice.candidates import Candidate, Weights
from tying.advice.distil import distil, free, lean_copy
from tying.advice.measure import Comparison, Record, low_rank_values, ranks_of_equal_size, tied_values
from tying.advice.plans import Plan, Planner
from tying.advice.report import GroupRow, PlanRow
from tying.selection.resolve import resolve


@dataclass(frozen=True)
class Study:
    """Measures what changes of a model do to its outputs.

    Attributes:
        model: the model.
        weights: the weights that may change, by name.
        comparison: compares outputs with the model's.
        record: what is measured already.
        progress: show progress bars.
    """

    model: nn.Module
    weights: Weights
    comparison: Comparison
    record: Record
    progress: bool

    def groups(self, candidates: Sequence[Candidate], planner: Planner) -> dict[Candidate, GroupRow]:
        """Return what a tie of each candidate does, the smallest error per saved byte first."""
        rows = {}
        for candidate in tqdm(candidates, desc="groups", disable=not self.progress):
            ranks = ranks_of_equal_size(candidate, self.weights)
            rows[candidate] = GroupRow(
                planner.ties([candidate]),
                candidate.names,
                candidate.saved(self.weights) * self.weights[candidate.names[0]].element_size(),
                self._error_of_tie(candidate),
                ranks,
                self._error_of_low_rank(candidate, ranks) if ranks else None,
            )
        return dict(sorted(rows.items(), key=lambda item: (item[1].error / item[1].saved_bytes, -item[1].saved_bytes)))

    def _error_of_tie(self, candidate: Candidate) -> float:
        def measure() -> list[float]:
            return [self.comparison.error_of_values(tied_values(candidate, self.weights))]

        [error] = self.record.values(f"tie {candidate.names} {candidate.relation}", measure)
        return error

    def _error_of_low_rank(self, candidate: Candidate, ranks: Sequence[int]) -> float:
        def measure() -> list[float]:
            return [self.comparison.error_of_values(low_rank_values(candidate, self.weights, ranks))]

        [error] = self.record.values(f"ranks {ranks} {candidate.names}", measure)
        return error

    def plans(
        self, plans: Iterable[Plan], training: Iterable[Any], steps: int, rate: float, parameters: int
    ) -> list[PlanRow]:
        """Return what the best plan of each kind does, the smallest error first.

        Args:
            plans: plans of several kinds.
            training: batches to distil on.
            steps: number of steps of distillation.
            rate: learning rate of the distillation.
            parameters: number of parameters among which to save.
        """
        best: dict[str, PlanRow] = {}
        for plan in tqdm([*plans], desc="plans", disable=not self.progress):
            error, saved, saved_bytes = self._effect_of(plan)
            row = PlanRow(plan, parameters - int(saved), int(saved_bytes), error, error)
            if plan.kind not in best or error < best[plan.kind].error:
                best[plan.kind] = row
        rows = [*best.values()]
        if steps:
            rows = [replace(row, error=self._error_after(row.plan, training, steps, rate)) for row in rows]
        return sorted(rows, key=lambda row: row.error)

    @contextmanager
    def _changed(self, plan: Plan) -> Iterator[nn.Module]:
        """Yield a copy of the model, changed by a plan, that shares all unchanged parameters with it."""
        ties = [*plan.ties, *(tie for relaxed in plan.relaxed.values() for tie in relaxed)]
        sources = [group.parameters[0] for group in resolve(self.model, ties)]  # which take the means, in place
        copied = lean_copy(self.model, sources)
        plan.apply(copied)
        yield copied
        free(copied, self.model)

    def _effect_of(self, plan: Plan) -> list[float]:
        """Return the error of a plan, and the numbers of values and bytes that it saves."""

        def measure() -> list[float]:
            with self._changed(plan) as changed:
                before, after = [*self.model.parameters()], [*changed.parameters()]
                saved = sum(p.numel() for p in before) - sum(p.numel() for p in after)
                saved_bytes = sum(p.nbytes for p in before) - sum(p.nbytes for p in after)
                return [self.comparison.error_of_model(changed), saved, saved_bytes]

        return self.record.values(f"plan {plan.key()}", measure)

    def _error_after(self, plan: Plan, training: Iterable[Any], steps: int, rate: float) -> float:
        """Return the error of a plan after distillation."""

        def measure() -> list[float]:
            with self._changed(plan) as changed:
                student = copy.deepcopy(changed)
            with tqdm(total=steps, desc=f"distilling: {plan.kind}", disable=not self.progress) as bar:
                distil(self.model, student, training, steps, rate, self.comparison.forward, bar.update)
            error = self.comparison.error_of_model(student)
            free(student, self.model)
            return [error]

        [error] = self.record.values(f"{steps} steps at {rate} of {plan.key()}", measure)
        return error
