"""Names of torch that are private, each with the reason; written against torch 2.11 to 2.15.

Everything else in this package uses torch's public names, `lightning_workarounds` holds those of Lightning.
"""

from __future__ import annotations

import torch
from torch import nn

# fused operations over lists of tensors, as torch's own optimizers use them: there is no public name
foreach_add = torch._foreach_add
foreach_add_ = torch._foreach_add_
foreach_norm = torch._foreach_norm
foreach_sub = torch._foreach_sub

# the two branches of an encoder layer; its public forward adds both to their shortcuts, which a merge does instead
attention_branch = nn.TransformerEncoderLayer._sa_block
feed_forward_branch = nn.TransformerEncoderLayer._ff_block
