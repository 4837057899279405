"""Advice on which weights may be tied: what ties do to a model's outputs, beside low rank of equal size.

:func:`advise` ties each group of weights that might be one to its mean, and compares the model's outputs on some
batches with those before, beside those with the same weights at low rank of equal size. Plans that meet the budget
follow: hard ties, relaxed ties, low rank, and ties with low rank elsewhere. The best plan of each kind is listed, after
distillation if there are ``steps``: a copy of the model, changed by the plan, is trained to give its outputs. The first
plan has the smallest error.

Besides the model, at most one copy of it is in memory. Distillation adds, for the parameters that remain, gradients and
the two moments of Adam.
"""

from tying.advice.advise import advise
from tying.advice.plans import Plan
from tying.advice.report import Advice, GroupRow, PlanRow

__all__ = ["Advice", "GroupRow", "Plan", "PlanRow", "advise"]
