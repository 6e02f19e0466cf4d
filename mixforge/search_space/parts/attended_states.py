"""Attention maps applied to values and to the hidden states of a scan: the module of `mass`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.kernels.attention import attend
from mixforge.search_space.parts.attention_pattern import Window
from mixforge.search_space.parts.decay import exact
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import Pass, TokenMixer, split_heads
from mixforge.search_space.parts.rotary import rotate
from mixforge.search_space.parts.short_convolution import ShortConvolution
from mixforge.search_space.parts.state_space import Selection, zero_state

_THETA = 10000.0


class AttendedStates(TokenMixer):
    """[B, T, D] -> [B, T, D].

    The state has rings of the keys, values and hidden states that each half of the heads sees, the last inputs of both
    convolutions, and the hidden state itself. The fused operation gives no map, so that a map over states is computed
    anew.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        states: int,
        windows: Sequence[Window],
        local: ShortConvolution,
        conv: ShortConvolution,
        selection: Selection,
        scan: Callable[..., tuple[Tensor, Tensor]],
        scan_step: Callable[..., tuple[Tensor, Tensor]],
        norms: Sequence[nn.Module],
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = width // heads
        self.states = states
        self.qkv = Dense(width, 3 * width, bias=False)
        self.gate = Dense(width, width, bias=False)
        self.windows = nn.ModuleList(windows)
        self.local = local
        self.conv = conv
        self.selection = selection
        self.scan = scan
        self.scan_step = scan_step
        self.fuse = Dense(heads, heads)
        self.norms = nn.ModuleList(norms)
        self.out = Dense(width, width, bias=False)

    def window(self, half: int) -> Window:
        window = self.windows[half]
        assert isinstance(window, Window)
        return window

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        channels = {"key": 1, "value": 1, "past": self.states}
        for half in range(2):
            slots = self.window(half).slots(capacity)
            for name, times in channels.items():
                shape = (batch, self.heads // 2, slots, times * self.head_dim)
                state[f"{name}{half}"] = torch.zeros(shape, device=device, dtype=dtype)
        state["local"] = self.local.initial_state(batch, device, dtype)
        state["conv"] = self.conv.initial_state(batch, device, dtype)
        state["hidden"] = zero_state(batch, (self.selection.rate.numel(),), device, dtype)
        return state

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        return self.run(x_BTD, state, at, False), state

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        return self.run(x_BD[:, None], state, at, True)[:, 0], state

    def run(self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass, is_step: bool) -> Tensor:
        """A sequence or one token; the state is brought up to date in place."""
        q, k, v = self.qkv(x_BTD).chunk(3, -1)
        local_BTD = convolved(self.local, "local", v, state, is_step)
        v_BHTK = split_heads(v, self.heads).transpose(1, 2)
        q_BHTK, k_BHTK = (
            rotate(split_heads(each, self.heads), at.positions_T, _THETA).transpose(1, 2) for each in (q, k)
        )
        queries, values = q_BHTK.chunk(2, 1), v_BHTK.chunk(2, 1)
        keys = [self.met(half, "key", new, state, at, is_step) for half, new in enumerate(k_BHTK.chunk(2, 1))]

        def mapped(half: int, name: str, new: Tensor) -> Tensor:
            met = self.met(half, name, new, state, at, is_step)
            return self.apply_map(half, queries[half], keys[half], met, at, is_step)

        near = mapped(0, "value", values[0])
        far = mapped(1, "value", near + values[1])
        said_BTD = torch.cat([near, far], 1).transpose(1, 2).flatten(2)
        u_BTD = convolved(self.conv, "conv", said_BTD, state, is_step)
        h_BTF, c_BTN = self.scanned(u_BTD, state, is_step)
        h_BHTF = split_heads(h_BTF.to(x_BTD.dtype), self.heads).transpose(1, 2)
        halves = [mapped(half, "past", new) for half, new in enumerate(h_BHTF.chunk(2, 1))]
        s_BTFH = self.fuse(torch.cat(halves, 1).permute(0, 2, 3, 1))
        s_BTDN = torch.unflatten(s_BTFH.transpose(2, 3).flatten(2), -1, (-1, self.states))
        z_BTD = (s_BTDN @ c_BTN[..., None])[..., 0] + self.selection.skip * u_BTD
        inner, outer = self.norms
        y: Tensor = self.out(outer((inner(z_BTD) + local_BTD) * F.silu(self.gate(x_BTD))))
        return y

    def met(
        self, half: int, name: str, new: Tensor, state: dict[str, Tensor] | None, at: Pass, is_step: bool
    ) -> Tensor:
        """Entries of the tokens that the queries of a pass meet; new ones are kept."""
        if state is None:
            return new
        ring, window = state[f"{name}{half}"], self.window(half)
        if not is_step:
            return window.extend(ring, new, at.start)
        return ring.index_copy_(2, window.slot(at.positions_T, ring.shape[2]), new)

    def apply_map(
        self, half: int, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, at: Pass, is_step: bool
    ) -> Tensor:
        """[B, H, T, V] of one half's heads."""
        window = self.window(half)
        if is_step:
            seen = window.sees(at.positions_T, window.held(at.positions_T, k_BHSK.shape[2]))
            return attend(q_BHTK, k_BHSK, v_BHSV, seen)
        key_S = window.meets(at.start, q_BHTK.shape[2], q_BHTK.device)
        return window.attend(q_BHTK, k_BHSK, v_BHSV, at.positions_T, key_S)

    def scanned(self, u_BTD: Tensor, state: dict[str, Tensor] | None, is_step: bool) -> tuple[Tensor, Tensor]:
        """Hidden states [B, T, D N], in float32 or better, and C [B, T, N]."""
        dt_BTD, b_BTN, c_BTN = self.selection(u_BTD)
        log_BTF = (dt_BTD[..., None] * self.selection.rates()).flatten(2)
        write_BTF = ((dt_BTD * exact(u_BTD))[..., None] * exact(b_BTN)[:, :, None]).flatten(2)
        if state is None:
            return self.scan(log_BTF, write_BTF, None)[0], c_BTN
        if is_step:
            h_BF, after = self.scan_step(log_BTF[:, 0], write_BTF[:, 0], state["hidden"])
            h_BTF = h_BF[:, None]
        else:
            h_BTF, after = self.scan(log_BTF, write_BTF, state["hidden"])
        state["hidden"].copy_(after)
        return h_BTF, c_BTN


def convolved(
    conv: ShortConvolution, name: str, x_BTD: Tensor, state: dict[str, Tensor] | None, is_step: bool
) -> Tensor:
    """The convolution of a sequence or of one token; the state is brought up to date in place."""
    if state is None:
        return conv(x_BTD, None)[0]  # type: ignore[no-any-return]
    if is_step:
        return conv.step(x_BTD[:, 0], state[name])[:, None]
    y_BTD, after = conv(x_BTD, state[name])
    state[name].copy_(after)
    return y_BTD  # type: ignore[no-any-return]
