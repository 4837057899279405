"""Triton's kernels, by its interpreter, against the reference."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import torch
from tying.hashing import HashedLinear, UniformHash, parametrization

parametrization.FUSED = ("cpu",)
torch.manual_seed(0)
for batch, inputs, outputs, seed, first in [(1, 1, 1, 0, 0), (5, 7, 9, 3, 0), (33, 40, 70, -5, (1 << 33) + 11)]:
    fused = HashedLinear(inputs, outputs, True, 0.3, UniformHash(seed), index="computed")
    plain = HashedLinear(inputs, outputs, True, 0.3, UniformHash(seed), index="stored")
    for layer in (fused, plain):
        layer.virtual.first = first
        layer.virtual.scale = 0.5
    plain.virtual.move()
    plain.load_state_dict(fused.state_dict())
    assert fused.virtual.fusible_seed(fused.table) == seed
    x = torch.randn(2, batch, inputs, requires_grad=True)
    upstream = torch.randn(2, batch, outputs)
    ends = [[layer(x), *torch.autograd.grad((layer(x) * upstream).sum(), [x, *layer.parameters()])] for layer in (fused, plain)]
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
try:
    torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)[0].sum().backward()
    raise AssertionError("second derivatives should be refused")
except RuntimeError as error:
    assert "once_differentiable" in str(error)
print("done")
"""


def test_kernels_are_the_reference(tmp_path):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "done", done.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_on_a_gpu(dtype):
    from tying.hashing import HashedLinear

    layers = [
        HashedLinear(300, 200, True, 0.1, index=index, device="cuda", dtype=dtype) for index in ("computed", "stored")
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(64, 300, device="cuda", dtype=dtype, requires_grad=True)
    ends = [
        [layer(x), *torch.autograd.grad(layer(x).float().square().sum(), [x, *layer.parameters()])] for layer in layers
    ]
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
