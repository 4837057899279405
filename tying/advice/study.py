"""Measure ties, low rank and plans on one model."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm import tqdm

from tying.advice.candidates import Candidate, Weights
from tying.advice.distil import distil, lean_copy
from tying.advice.measure import Comparison, Record, low_rank_values, rank_of_equal_size, tied_values
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
            rank = rank_of_equal_size(candidate, self.weights)
            rows[candidate] = GroupRow(
                planner.ties([candidate]),
                candidate.names,
                candidate.saved(self.weights) * self.weights[candidate.names[0]].element_size(),
                self._error_of_tie(candidate),
                rank,
                self._error_of_low_rank(candidate, rank) if rank else None,
            )
        return dict(sorted(rows.items(), key=lambda item: (item[1].error / item[1].saved_bytes, -item[1].saved_bytes)))

    def _error_of_tie(self, candidate: Candidate) -> float:
        def measure() -> float:
            return self.comparison.error_of_values(tied_values(candidate, self.weights))

        return self.record.error(f"tie {candidate.names} {candidate.relation}", measure)

    def _error_of_low_rank(self, candidate: Candidate, rank: int) -> float:
        def measure() -> float:
            return self.comparison.error_of_values(low_rank_values(candidate, self.weights, rank))

        return self.record.error(f"rank {rank} {sorted(candidate.names)}", measure)

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
        errors = {}
        for plan in tqdm([*plans], desc="plans", disable=not self.progress):
            errors[plan.key()] = (self._error_of_plan(plan), plan)
        best: dict[str, tuple[float, Plan]] = {}
        for error, plan in errors.values():
            if plan.kind not in best or error < best[plan.kind][0]:
                best[plan.kind] = error, plan
        rows = []
        for before, plan in best.values():
            after = self._error_after(plan, training, steps, rate) if steps else before
            saved, saved_bytes = self._saved(plan)
            rows.append(PlanRow(plan, parameters - saved, saved_bytes, after, before))
        return sorted(rows, key=lambda row: row.error)

    def changed(self, plan: Plan) -> nn.Module:
        """Return a copy of the model, changed by a plan, that shares all unchanged parameters with it."""
        ties = [*plan.ties, *(tie for relaxed in plan.relaxed.values() for tie in relaxed)]
        sources = [group.parameters[0] for group in resolve(self.model, ties)]  # which take the means, in place
        copied = lean_copy(self.model, sources)
        plan.apply(copied)
        return copied

    def _saved(self, plan: Plan) -> tuple[int, int]:
        """Return the numbers of values and bytes that a plan saves."""
        before, after = [*self.model.parameters()], [*self.changed(plan).parameters()]
        return (
            sum(p.numel() for p in before) - sum(p.numel() for p in after),
            sum(p.nbytes for p in before) - sum(p.nbytes for p in after),
        )

    def _error_of_plan(self, plan: Plan) -> float:
        return self.record.error(f"plan {plan.key()}", lambda: self.comparison.error_of_model(self.changed(plan)))

    def _error_after(self, plan: Plan, training: Iterable[Any], steps: int, rate: float) -> float:
        def measure() -> float:
            student = copy.deepcopy(self.changed(plan))
            with tqdm(total=steps, desc=f"distilling: {plan.kind}", disable=not self.progress) as bar:
                distil(self.model, student, training, steps, rate, self.comparison.forward, bar.update)
            return self.comparison.error_of_model(student)

        return self.record.error(f"{steps} steps at {rate} of {plan.key()}", measure)
