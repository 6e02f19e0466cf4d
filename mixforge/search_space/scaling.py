"""How initial weights and learning rates follow the width: `scale=mup`.

    embedding, read as rows       variance 1 / BASE          rate 1
    matrices width x width        variance 1 / fan-in        rate BASE / width
    matrices into a fixed size    variance 1 / fan-in        rate BASE / width
    everything else               as it is                   rate 1
    logits                        BASE / width times the product with the embedding or the head

so that what one step of Adam changes in every activation does not depend on the width, and the best learning rate of
a narrow model is that of a wide one. At a width of BASE it is `standard`.

Source: Yang et al. 2022 (arXiv 2203.03466), table 8. Attention scores are divided by sqrt(K) and not by K: the size of
a head stays the same while the number of heads follows the width, unless a gene says otherwise. It does
not for `gau`, which has one head and by default queries and keys of a quarter of the width: what a step changes in its
scores grows with the root of the width. A key_dim that is said, the same at every width, keeps them as they are.
"""

from __future__ import annotations

from torch import nn

BASE = 64


def rate_factors(narrow: nn.Module, wide: nn.Module, width: int) -> dict[str, float]:
    """Factors on the learning rate of a stack's weights by their names, where they are not 1.

    `wide` is the same stack at twice the width; neither needs values. A weight is summed over the width where two of
    its sides grow with it, or where it is a matrix whose last side does.
    """
    sizes = {name: weight.shape for name, weight in wide.named_parameters()}
    found: dict[str, float] = {}
    for name, weight in narrow.named_parameters():
        grown = [_grows(size, twice) for size, twice in zip(weight.shape, sizes[name], strict=True)]
        if sum(grown) >= 2 or (len(grown) >= 2 and grown[-1]):
            found[name] = BASE / width
    return found


def output_scale(width: int) -> float:
    """What logits are multiplied by."""
    return BASE / width


def _grows(size: int, wider: int) -> bool:
    """Whether a side grows with the width, which some do in rounded steps."""
    return 2 * wider >= 3 * size
