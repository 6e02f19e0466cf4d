"""Keys and values that state spaces make of chunks, against Attamba's equations as loops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from attention_oracle import WIDTH, agree, attention, built, by_steps, rope, split, tokens
from torch import Tensor

from mixforge.search_space.genes import Form
from mixforge.search_space.mixers.attn import Attn

CHUNK, LEADING, STATES = 4, 3, 32


def state_space(x_LF: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    """Dao and Gu 2024: h_t = e^(A dt) h_{t-1} + dt B_t x_t^T, y_t = C_t h_t + D x_t, then norm(y silu(z)), projected."""

    def weight(part: str) -> Tensor:
        return w[f"memory.{name}_states.mixer.{part}"]

    mixed_LF, taps_FW = x_LF @ weight("mixed.weight").T, weight("conv.weight")
    padded_LF = F.pad(mixed_LF, (0, 0, taps_FW.shape[1] - 1, 0))
    heads = len(weight("decay.rate"))
    h_HNP = torch.zeros(heads, STATES, (mixed_LF.shape[1] - 2 * STATES) // heads, dtype=torch.float64)
    rows = []
    for t in range(len(x_LF)):
        mixed_F = F.silu((padded_LF[t : t + taps_FW.shape[1]] * taps_FW.T).sum(0))
        c_N, b_N, u_F = mixed_F.split([STATES, STATES, len(mixed_F) - 2 * STATES])
        dt_H = F.softplus(weight("decay.step_size.weight") @ x_LF[t] + weight("decay.bias"))
        y_P = []
        for h, u_P in enumerate(u_F.chunk(heads)):
            h_HNP[h] = torch.exp(-weight("decay.rate")[h].exp() * dt_H[h]) * h_HNP[h]
            h_HNP[h] += dt_H[h] * torch.outer(b_N, u_P)
            y_P.append(c_N @ h_HNP[h] + weight("skip.weight")[h] * u_P)
        gated_P = torch.cat(y_P) * F.silu(weight("output.gate.weight") @ x_LF[t])
        scale = torch.rsqrt(gated_P.square().mean() + 1e-6)
        rows.append(weight("output.out.weight") @ (weight("output.norm.weight") * gated_P * scale))
    return torch.stack(rows)


def made(x_TD: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    """W x + SSM(W x), anew for each chunk."""
    projected_TF = x_TD @ w[f"memory.{name}.weight"].T
    return torch.cat([piece + state_space(piece, w, name) for piece in projected_TF.split(CHUNK)])


def test_keys_and_values_are_states_of_chunks_and_their_boundaries_are_seen() -> None:
    def sees(t: int, s: int) -> bool:
        return s <= t and (t - s < LEADING or (s + 1) % CHUNK == 0)

    def expected(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        q_THK = split(x_TD @ w["queries.query.weight"].T, 4)
        k_THK, v_THK = split(made(x_TD, w, "key"), 4), split(made(x_TD, w, "value"), 4)
        return attention(rope(q_THK, 6), rope(k_THK, 6), v_THK, sees=sees) @ w["output.out.weight"].T

    agree(
        Attn(heads=4, kv=Form("ssm_chunk", (CHUNK,)), sparse=Form("boundaries", (CHUNK, LEADING))), expected
    )


def test_the_cache_shrinks_with_the_chunk() -> None:
    mixer = Attn(heads=4, kv=Form("ssm_chunk", (8,)), sparse=Form("boundaries", (8, 2)))
    _, state = by_steps(built(mixer)[0], tokens(23))
    # Two boundaries, and two tokens that are none.
    assert state["key"].shape == (1, 4, 4, 6)
    grown = mixer.cost(WIDTH, 8000).state_bytes - mixer.cost(WIDTH, 4000).state_bytes
    assert 8 * grown == 4000 * 2 * WIDTH * 4
