"""Advice on which weights may be tied: what ties do to a model's outputs, beside low rank of equal size."""

from tying.advice.advise import advise
from tying.advice.plans import Plan
from tying.advice.report import Advice, GroupRow, PlanRow

__all__ = ["Advice", "GroupRow", "Plan", "PlanRow", "advise"]
