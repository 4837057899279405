"""How far ratios of two equal programs are from 1: the races of :mod:`benchmarks.speed.timing`, and torch's timers."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.utils.benchmark import Timer

from benchmarks.report import table
from benchmarks.speed.timing import Step, passes, race, time_of

TRIALS = 40
SECONDS = 0.2  # for each side of a comparison
BUSY = """
import time
while True:
    time.sleep(0.5)
    end = time.perf_counter() + 0.5
    while time.perf_counter() < end:
        pass
"""


def raced(step: Step) -> float:
    """Return the ratio of a race of a program with itself."""
    rounds = max(1, round(SECONDS / min(time_of(step) for _ in range(9)) / 5))
    return statistics.median(race({"one": step, "other": step}, races=5, rounds=rounds).ratios("one", "other"))


def in_succession(step: Step, method: str, **limits: float) -> float:
    """Return the ratio of two measurements of a program by a method of torch's timer."""
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    first, second = (getattr(timer, method)(min_run_time=SECONDS, **limits).median for _ in range(2))
    return float(first / second)


def measure() -> str:
    """Run the measurement, and return its table as Markdown."""
    source, target = torch.randn(2, 1 << 21)
    steps: dict[str, Step] = {
        "copy of 8 MiB": lambda: target.copy_(source),
        "pass of a layer of 1024": passes(nn.Linear(1024, 1024), torch.randn(64, 1024)),
    }
    ways: dict[str, Callable[[Step], float]] = {
        "race": raced,
        "torch's blocked_autorange": lambda step: in_succession(step, "blocked_autorange"),
        "torch's adaptive_autorange": lambda step: in_succession(step, "adaptive_autorange", max_run_time=2 * SECONDS),
    }
    ratios: dict[tuple[str, str], list[float]] = {(step, way): [] for step in steps for way in ways}
    with subprocess.Popen([sys.executable, "-c", BUSY]) as process:
        try:
            for _, (step, way) in itertools.product(range(TRIALS), ratios):
                ratios[step, way].append(ways[way](steps[step]))
        finally:
            process.kill()
    cells = {
        key: "{1:.3f} ({0:.3f}–{2:.3f})".format(*np.quantile(values, [0.05, 0.5, 0.95]))
        for key, values in ratios.items()
    }
    rows = [[way, *(cells[step, way] for step in steps)] for way in ways]
    caption = (
        f"A program timed against itself, while another one keeps a core busy in every other half second; medians of "
        f"{TRIALS} ratios (5 % to 95 % of them), each of about {SECONDS:g} s a side:"
    )
    return f"{caption}\n\n{table(['way', *steps], rows)}"
