"""The script on the page about parallel training runs on two processes, and saves what one process would load."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

PAGE = Path(__file__).parents[1] / "docs" / "parallel.md"


def test_the_script_runs_on_two_processes(tmp_path):
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "sharded.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "sharded.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 or (tmp_path / "weights.pt").exists(), done.stderr[-3000:]
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    exec(code, scope := {"__name__": "page"})
    scope["Network"]().load_state_dict({name.removeprefix("network."): value for name, value in weights.items()})
    assert torch.equal(weights["network.embed.weight"], weights["network.head.weight"])
    assert "HardTying: network.embed.weight is now network.head.weight" in done.stdout + done.stderr
    assert "SoftTying: " in done.stdout + done.stderr
