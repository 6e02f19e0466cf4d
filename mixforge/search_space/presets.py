"""Published architectures by name: `preset("griffin", size="small")`.

Each is a text with places for the sizes. `tiny` trains in seconds on one core and is what campaigns on a
laptop start from; `small` has the depth and width of the papers' smallest models. The vocabulary is
bytes, unless `replace(vocab=...)` says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from mixforge.search_space.architecture import Architecture
from mixforge.search_space.notation import parse
from mixforge.search_space.syntax import nearest

Size = Literal["tiny", "small"]
SIZES: tuple[Size, ...] = ("tiny", "small")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A published architecture."""

    name: str
    summary: str
    paper: str
    """Authors, year, arXiv id, and the section or figure that shows the stack."""
    template: str
    """An expression with places such as {width}."""
    sizes: Mapping[Size, Mapping[str, int]]

    def architecture(self, size: Size = "tiny") -> Architecture:
        """The architecture of one size. Raises ValueError for an unknown size."""
        if size not in self.sizes:
            raise ValueError(f"preset {self.name} has no size {size!r}; it has {', '.join(self.sizes)}")
        return parse(self.template.format(**self.sizes[size]))


def _sizes(tiny: Mapping[str, int], small: Mapping[str, int]) -> Mapping[Size, Mapping[str, int]]:
    return {"tiny": {"width": 64, "window": 64, **tiny}, "small": {"width": 512, "window": 1024, **small}}


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="transformer",
            summary="softmax attention and gated feed-forward layers in turn",
            paper="Vaswani et al. 2017 (arXiv 1706.03762), figure 1; pre-norm, RoPE and SwiGLU as in "
            "Touvron et al. 2023 (arXiv 2302.13971), section 2.2",
            template="lm({depth} * (attn + swiglu), width={width})",
            sizes=_sizes({"depth": 4}, {"depth": 12}),
        ),
        Preset(
            name="gdn",
            summary="Gated DeltaNet and gated feed-forward layers in turn, no attention",
            paper="Yang et al. 2024 (arXiv 2412.06464), section 3.4 and figure 1",
            template="lm({depth} * (gdn + swiglu), width={width})",
            sizes=_sizes({"depth": 4}, {"depth": 12}),
        ),
        Preset(
            name="mamba2",
            summary="Mamba-2 layers alone, without feed-forward layers",
            paper="Dao and Gu 2024 (arXiv 2405.21060), section 7",
            template="lm({depth} * mamba2, width={width})",
            sizes=_sizes({"depth": 6}, {"depth": 24}),
        ),
        Preset(
            name="griffin",
            summary="two gated linear recurrences for each layer of local multi-query attention",
            paper="De et al. 2024 (arXiv 2402.19427), section 3 and figure 2",
            template="lm({groups} * (2 * (rglru + geglu) + attn(kv=mqa, window={window}) + geglu),"
            " width={width})",
            sizes=_sizes({"groups": 1}, {"groups": 4}),
        ),
        Preset(
            name="hybrid_3to1",
            summary="three Gated DeltaNet layers for each layer of full attention",
            paper="Wang et al. 2025 (arXiv 2507.06457), which recommends Gated DeltaNet at 3:1 to 6:1",
            template="lm({groups} * (3 * (gdn + swiglu) + attn + swiglu), width={width})",
            sizes=_sizes({"groups": 1}, {"groups": 3}),
        ),
        Preset(
            name="parallel_hybrid",
            summary="Mamba-2 and attention heads side by side in every layer, each with half of the heads",
            paper="Dong et al. 2024 (arXiv 2411.13676), section 2.1 and equation 3, without meta tokens and "
            "shared caches, and with attention to every token",
            template="lm({depth} * (beside(1*attn, 1*mamba2, fuse=mean) + swiglu), width={width})",
            sizes=_sizes({"depth": 4}, {"depth": 12}),
        ),
        Preset(
            name="yoco",
            summary="a self-decoder of local attention, then layers that all read one shared cache",
            paper="Sun et al. 2024 (arXiv 2405.05254), section 2 and figure 2, with a sliding-window "
            "self-decoder",
            template="lm({half} * (attn(window={window}) + swiglu) + attn(kv=own) + swiglu"
            " + {readers} * (attn(kv=shared) + swiglu), width={width})",
            sizes=_sizes({"half": 2, "readers": 1}, {"half": 6, "readers": 5}),
        ),
    )
}


@lru_cache(maxsize=64)
def preset(name: str, size: Size = "tiny") -> Architecture:
    """A published architecture by name. Raises ValueError for an unknown name or size."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset '{name}'{nearest(name, PRESETS)}; known: {', '.join(PRESETS)}")
    return PRESETS[name].architecture(size)
