"""Selective scan along the channels, a channel mixer: each token's channels are read as a sequence, from both ends.

    s_1 .. s_n = x_t in segments of `segment` channels
    y_t = mamba(s_1 .. s_n) + reversed(mamba'(s_n .. s_1))

with two blocks of `mixers.ssm` as wide as a segment, each with its own weights.

Source: Behrouz et al. 2024 (arXiv 2403.19888), section 3.2: the selective channel mixer of MambaMixer, bidirectional as
channels have no order of causes. Departure: its features of a channel are all tokens, which would let a token see later
ones; here they are the channels beside it in its segment, and so nothing passes between tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from mixforge.search_space.genes import Whole
from mixforge.search_space.mixer import Backend, Cost, Mixer
from mixforge.search_space.mixers.ssm import Ssm
from mixforge.search_space.part import Part
from mixforge.search_space.parts.layer import Pass, TokenMixer

# Channels of a segment where nothing is said: the most that divide the width.
USUAL_SEGMENT = 16


@dataclass(frozen=True, slots=True)
class SsmChannel(Mixer):
    """Selective scan along the channels. Genes: channels of a segment, and state numbers of a channel."""

    kind: ClassVar[Literal["token", "channel"]] = "channel"

    segment: Annotated[int | None, Whole(1, 4096)] = None
    state: Annotated[int, Whole(1, 256)] = 16

    def size(self, width: int) -> int:
        """Channels of a segment."""
        if self.segment is not None:
            return self.segment
        most = min(USUAL_SEGMENT, max(1, width // 2))
        return next(size for size in range(most, 0, -1) if width % size == 0)

    def why_illegal(self, width: int) -> str | None:
        size = self.size(width)
        if width % size != 0 or width == size:
            legal = ", ".join(str(n) for n in range(1, width // 2 + 1) if width % n == 0)
            return (
                f"segments of {size} channels do not divide width {width} into two or more (mixer ssm_channel); "
                f"legal: {legal}"
            )
        return None

    def canonical(self, width: int) -> Self:
        return (
            replace(self, segment=None)
            if self.size(width) == replace(self, segment=None).size(width)
            else self
        )

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        size = self.size(width)
        one_way = Ssm(state=self.state).cost(size, width // size, itemsize)
        return Cost(
            params=2 * one_way.params,
            flops=2 * length * one_way.flops,
            state_bytes=0,
            decode_bytes=2 * one_way.params * itemsize,
        )

    def build(self, width: int, backend: Backend) -> Part:
        size = self.size(width)
        scan = Ssm(state=self.state)
        return Part(ChannelScan, size=size, ahead=scan.build(size, backend), back=scan.build(size, backend))


class ChannelScan(nn.Module):
    """[..., D] -> [..., D]."""

    def __init__(self, size: int, ahead: TokenMixer, back: TokenMixer) -> None:
        super().__init__()
        self.size = size
        self.ahead = ahead
        self.back = back

    def forward(self, x: Tensor) -> Tensor:
        s_MTD = x.reshape(-1, x.shape[-1] // self.size, self.size)
        at = Pass(torch.arange(s_MTD.shape[1], device=x.device), 0)
        ahead_MTD, _ = self.ahead(s_MTD, None, at)
        back_MTD, _ = self.back(s_MTD.flip(1), None, at)
        y: Tensor = (ahead_MTD + back_MTD.flip(1)).reshape(x.shape)
        return y
