"""Train own blocks on two processes, in mode "batch", and save what each skipped: run by torchrun."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_own_blocks import FORMS, WIDTH, Wrapped
from torch.nn.parallel import DistributedDataParallel

from tying.depth import StochasticDepth, apply_merge


def main(out: Path) -> None:
    """Train a block of each form for some steps; its further argument comes from a layer that only the block uses."""
    dist.init_process_group("gloo")
    results = {}
    for form, make in FORMS.items():
        torch.manual_seed(0)
        model = Wrapped(make())
        apply_merge(model, "block", StochasticDepth(0.5))
        trained = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        torch.manual_seed(dist.get_rank())
        skipped = []
        for _ in range(8):
            x = torch.randn(4, WIDTH, requires_grad=True)
            optimizer.zero_grad()
            y = trained(x, torch.rand(4, WIDTH))
            skipped.append(torch.equal(x, y))
            y.square().sum().backward()
            optimizer.step()
        results[form] = (skipped, [weight.detach() for weight in model.parameters()])
    torch.save(results, out / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
