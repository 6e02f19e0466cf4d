"""Mean cross-entropy of linear logits, in nats, without the logits in memory where there are many of them.

    loss = -mean_n log softmax(W x_n)[target_n]

For many logits it is torch's own operation, which takes some rows at a time and makes the gradients on the way. torch
has it from 2.13 on; before that, and for few logits, the logits are made. 4,096 rows of width 256, forward and backward
in float32 on one thread, plain / in chunks: vocabulary 256, 19 / 26 ms; 1,024, 82 / 86; 2,048, 223 / 139; 32,768,
3,184 / 1,975 with 1,667 / 310 MiB at the peak.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.kernels.dense import dense

# Below, the products are too small to pay for the chunks.
LEAST_VOCAB = 2048
# Each chunk adds to the whole gradient of W, so that short ones are slow: 16 rows, torch's choice, take twice the time.
CHUNK_ROWS = 1024
# The function is older than the option that it works in chunks.
HAS_CHUNKS = hasattr(nn, "LinearCrossEntropyOptions")


def linear_cross_entropy(x_ND: Tensor, weight_XD: Tensor, targets_N: Tensor) -> Tensor:
    """The loss of targets in [0, X), a float32 scalar (float64 where x is). It has a first derivative only."""
    is_large = weight_XD.shape[0] >= LEAST_VOCAB and x_ND.shape[0] > CHUNK_ROWS
    if not (HAS_CHUNKS and is_large):
        logits_NX = dense(x_ND, weight_XD)
        dtype = logits_NX.dtype
        return F.cross_entropy(logits_NX if dtype.itemsize >= 4 else logits_NX.float(), targets_N)
    # torch.compile traces only the mode that allows for a second backward pass, which costs one more gradient.
    options = nn.LinearCrossEntropyOptions(
        batch_chunk_size=CHUNK_ROWS, allow_retain_graph=torch.compiler.is_compiling()
    )
    loss: Tensor = F.linear_cross_entropy(x_ND, weight_XD, targets_N, options=options)
    return loss if loss.dtype.itemsize >= 4 else loss.float()
