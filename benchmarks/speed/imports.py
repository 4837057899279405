"""How long imports take: this package beside torch, and its callbacks beside Lightning."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.report import table
from benchmarks.speed.timing import Race

RACES = 5
ROUNDS = 3
PEERS = {
    "torch": "torch",
    "tying": "torch",
    "lightning.pytorch": "lightning.pytorch",
    "tying.callbacks": "lightning.pytorch",
    "tying.cli": "lightning.pytorch",
}


def seconds_of(module: str) -> float:
    """Return the processor's seconds for an import in a new process, without the start of Python."""
    code = f"import time; start = time.process_time(); import {module}; print(time.process_time() - start)"
    return float(subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, check=True).stdout)


def measure() -> str:
    """Run the measurement, and return its table as Markdown."""
    seconds: dict[str, list[float]] = {module: [] for module in PEERS}
    for _ in range(RACES):
        rounds = [{module: seconds_of(module) for module in PEERS} for _ in range(ROUNDS)]
        for module in PEERS:
            seconds[module].append(min(times[module] for times in rounds))
    race = Race(seconds)
    rows = [
        [f"import {module}", f"{race.median(module):.2f}", race.told(module, peer), peer]
        for module, peer in PEERS.items()
    ]
    title = f"Processor time of an import, the best of {ROUNDS} new processes; median of {RACES} races (extremes):"
    return f"{title}\n\n{table(['statement', 's', 'ratio', 'to'], rows)}"
