"""Train every row on two processes, by DDP and by FSDP2; rank 0 writes what came out. Run by torchrun."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from survival import ROWS, assert_shared, batch, loss_of, made

from tying.hard import bake


def train(row, kind, rank):
    net = made(row).double()
    trained = DistributedDataParallel(net) if kind == "DDP" else fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    own = batch(dtype=torch.float64).chunk(2)[rank]
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(trained, own).backward()
        optimizer.step()
    if kind == "DDP":
        assert_shared(net, row)
        return bake(net), "yes"
    state = net.state_dict()  # a hash describes itself in a plain tensor
    full = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}
    fresh = made(row).double()
    fresh.load_state_dict(full)
    assert_shared(fresh, row)
    return bake(fresh), "yes, within one group"


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    outcomes: dict[str, dict[str, object]] = {"DDP": {}, "FSDP2": {}}
    for kind, rows in outcomes.items():
        for row in ROWS:
            try:
                weights, remark = train(row, kind, rank)
                told = {name: value.tolist() for name, value in weights.items()}
                rows[row] = {"weights": told, "remark": remark, "error": ""}
            except Exception:
                rows[row] = {"weights": {}, "remark": "", "error": traceback.format_exc()}
    if rank == 0:
        out.write_text(json.dumps(outcomes))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
