"""``python -m benchmarks``: the demo, the speed tables, and their place in the README."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import demo, speed_data, speed_soft
from benchmarks.machine import describe
from benchmarks.report import RESULTS, ROOT, paste, write
from tying.errors import ConfigurationError

SPEED = {"data": speed_data.measure, "soft": speed_soft.measure}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("demo", help="train untied and softly tied, side by side: a table, a PNG and a CSV")
    shown.add_argument("--out", type=Path, default=Path("runs/demo"), help="where to write")
    shown.add_argument("--save", action="store_true", help="keep the table under benchmarks/results")
    speed = commands.add_parser("speed", help="times against named peers, as ratios")
    speed.add_argument("family", nargs="*", metavar="FAMILY", help=f"of {', '.join(SPEED)}; all by default")
    speed.add_argument("--save", action="store_true", help="keep the table under benchmarks/results")
    commands.add_parser("readme", help="paste the kept results into the README")
    known, overrides = parser.parse_known_args(arguments)
    if overrides and known.command != "demo":
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    try:
        if known.command == "demo":
            text = demo.run(known.out, overrides)
            command = " ".join(["python -m benchmarks demo", *overrides]) if overrides else "make demo"
            _keep("demo", f"{text}\n\nCommand: `{command}`.", known.save)
            print(f"Curves: {known.out}/demo.png, {known.out}/demo.csv")
        elif known.command == "speed":
            for family in known.family or SPEED:
                if family not in SPEED:
                    raise ConfigurationError(f"unknown family {family!r}: there is {', '.join(SPEED)}")
                text = f"{SPEED[family]()}\n\n{describe()}. Command: `python -m benchmarks speed {family}`."
                _keep(f"speed_{family}", text, known.save)
        else:
            write(ROOT / "README.md", paste((ROOT / "README.md").read_text()))
    except ConfigurationError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    return 0


def _keep(name: str, text: str, save: bool) -> None:
    print(f"\n{text}")
    if save:
        write(RESULTS / f"{name}.md", text + "\n")


if __name__ == "__main__":
    sys.exit(main())
