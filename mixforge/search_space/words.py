"""The words of `lm(...)`: their legal values and defaults. This module loads no torch.

vocab         token ids
embed         whether the head shares the embedding's weights
norm          which norm every residual unit has, and the model before its head; prepbn(n) is a layer norm that becomes
              a batch norm in n training passes (`parts/progressive_norm`)
place         where it stands, and how a unit's output joins the residual stream (`parts/residual`)
eps           the number under the root of the norms; auto is what the norm has by itself
scale         how initial weights and learning rates follow the width (`scaling`)
weights       sigma: each linear map is divided by its spectral norm (`parts/sigma`)
shortcut      what a unit reads beside the unit before it (`parts/shortcut`)
softcap       logits c tanh(logits / c)
embed_scale   what embeddings are multiplied by; sqrt is the root of the width
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from mixforge.search_space.genes import Call, Choice, Gene, Real, Whole

WIDEST = 65_536
LARGEST_VOCAB = 16_777_216

WIDTH = Gene("width", (Whole(1, WIDEST),), 0)
WORDS: dict[str, Gene] = {
    gene.name: gene
    for gene in (
        Gene("vocab", (Whole(2, LARGEST_VOCAB),), 256),
        Gene("embed", (Choice("tied", "untied"),), "tied"),
        Gene("norm", (Choice("rms", "layer", "simple"), Call("prepbn", Whole(1, 1_000_000_000))), "rms"),
        Gene("place", (Choice("pre", "post", "sandwich", "inside", "deep", "gated", "none"),), "pre"),
        Gene("eps", (Real(1e-12, 0.1),), None),
        Gene("scale", (Choice("standard", "mup"),), "standard"),
        Gene("weights", (Choice("plain", "sigma"),), "plain"),
        Gene("shortcut", (Choice("none", "average", "attention"),), "none"),
        Gene("softcap", (Choice("none"), Real(0.1, 10_000)), "none"),
        Gene("embed_scale", (Choice("sqrt"), Real(0.001, 10_000)), 1.0),
    )
}


@lru_cache(maxsize=1_024)
def names_of(gene: Gene) -> tuple[str, ...]:
    """The names that may stand as its value."""
    return tuple(_names(gene))


def _names(gene: Gene) -> Iterator[str]:
    if gene.default is None:
        yield "auto"
    for domain in gene.domains:
        if isinstance(domain, Choice):
            yield from domain.names
        if isinstance(domain, Call):
            yield domain.name
