"""Names of torch that are private, each with the reason; written against torch 2.11 to 2.15.

Everything else in this package uses torch's public names, `lightning_workarounds` holds those of Lightning.
"""

from __future__ import annotations

import torch

# fused operations over lists of tensors, as torch's own optimizers use them: there is no public name
foreach_add = torch._foreach_add
foreach_add_ = torch._foreach_add_
foreach_norm = torch._foreach_norm
foreach_sub = torch._foreach_sub
