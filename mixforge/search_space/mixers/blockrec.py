"""Block-recurrent attention: tokens that are near, and state vectors that are updated once for each block of tokens.

Tokens t of block b, with keys k, values v and queries q and p of their own, and c^b the S state vectors:

    own_t = softmax_s(q_t . k_s / sqrt(K)) v_s    local=window: over t - W < s <= t; chunk: over s <= t of block b
    mem_t = softmax_j(p_t . ks_j / sqrt(K)) vs_j             ks, vs, qs, ps = U norm(c^b + e), c^0 learned
    y_t   = W_o [own_t; mem_t]                               fuse=concat
    y_t   = W_o (a_h mem_t + (1 - a_h) own_t)                fuse=scalar, a_h = sigmoid(l_h) for each head

e is learned, so that no two states are alike. After the last token of block b, with its inputs x:

    update=attend   h_i = [softmax_j(qs_i . ks_j / sqrt(K)) vs_j;  softmax_s(ps_i . k_s / sqrt(K)) v_s over block b]
                    c^{b+1} = g c^b + (1 - g) (U_o h + b),  g = sigmoid(b_g)
    update=gru      r, u = sigmoid(W_r [c^b; z] + b_r), sigmoid(W_u [c^b; z] + b_u)
                    c^{b+1} = (1 - u) c^b + u norm(gelu(W_c [r c^b; z] + b_c)),  z the last x of each of S stretches
    update=fifo     m = mean of x,  n = sigmoid(W_g [c^b_S; m] + b_g)
                    c^{b+1} = [c^b_2, ..., c^b_S, n m + (1 - n) c^b_S]
    update=filters(n)
                    c^{b+1}_j = 2 Re sum_p C_jp (e^(dt_j A_jp) - 1) / A_jp h_jp + D_j x,  h = e^(dt_j A_jp) h + x over
                    all tokens so far: what the j-th of S filters says of the last token, n/2 complex A for each filter
                    and C for each channel

Only q and k between tokens are rotated by position. With one token at a time the states change in `between`, after the
last token of a block and before the first of the next.

Sources: update=attend: Hutchins et al. 2022 (arXiv 2203.07852), section 3.1 and 3.2 with the fixed gate and the skip
configuration, and the authors' code (google-research/meliad, transformer_layer.py) for the states' own projections,
norm and e. update=gru: Zhang et al. 2023 (Cached Transformers, arXiv 2312.12742), gated recurrent cache, in the form of
the authors' code (GRC_Attention.py). update=fifo: Kashyap 2025 (arXiv 2507.00453), chunked attention beside a gated
queue of slots. update=filters: Pilault et al. 2023 (Block-State Transformers, arXiv 2306.09539), context states of
several filters, as in the listing of its appendix, with S4D's state spaces (Gu et al. 2022, arXiv 2206.11893).

Departures: with update=attend the states read the tokens of one block, those of the code also the block before;
positions are rotary, not T5's relative ones; queries and keys have no norm; b_g begins at 1. A gated recurrent cache
is here one for each sequence, written by whole blocks and read by the blocks after them, where the paper's is one for
all of a training and is read by the tokens that wrote it; it is as wide as the layer; its first state is learned, its
norms are RMS, and y has one output projection. Of the queue the paper's abstract says that it is gated and first in,
first out: the mean and the gate's form are ours; the paper's attention to all tokens is a mixer beside this
one. Filters share their poles over the channels, where S4D has some for each channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from mixforge.kernels import attention
from mixforge.kernels.attention import attended_pairs
from mixforge.search_space.genes import Call, Choice, Form, GeneValue, Whole
from mixforge.search_space.headed import HeadedMixer
from mixforge.search_space.mixer import Backend, Cost
from mixforge.search_space.part import Part
from mixforge.search_space.parts.block_recurrence import BlockRecurrence
from mixforge.search_space.parts.norm import norm_part
from mixforge.search_space.parts.state_vectors import AttendingStates, FilteredStates, GatedCache, GatedQueue


@dataclass(frozen=True, slots=True)
class Blockrec(HeadedMixer):
    """Genes: heads and their size, tokens of a block (which is the window too), state vectors and how they are updated,
    which tokens a token sees, and how what it reads of them and of states comes together.
    """

    kind: ClassVar[Literal["token", "channel"]] = "token"
    aliases: ClassVar[Mapping[str, Mapping[str, GeneValue]]] = {
        "grc": {"update": "gru", "local": "chunk", "fuse": "scalar"},
        "gated_fifo": {"update": "fifo", "local": "chunk", "fuse": "scalar"},
    }

    heads: Annotated[int | None, Whole(1, 256)] = None
    head_dim: Annotated[int | None, Whole(2, 1024)] = None
    window: Annotated[int, Whole(2, 65_536)] = 16
    states: Annotated[int, Whole(1, 65_536)] = 16
    update: Annotated[str | Form, Choice("attend", "gru", "fifo"), Call("filters", Whole(2, 1024))] = "attend"
    local: Annotated[str, Choice("window", "chunk")] = "window"
    fuse: Annotated[str, Choice("concat", "scalar")] = "concat"

    @property
    def numbers(self) -> int:
        """Numbers that a filter has for each channel; 0 where there are no filters."""
        return int(self.update.arguments[0]) if isinstance(self.update, Form) else 0

    def why_illegal(self, width: int) -> str | None:
        undivided = HeadedMixer.why_illegal(self, width)
        if undivided is not None:
            return undivided
        _, head_dim = self.sizes(width)
        if head_dim % 2 != 0:
            return f"rotary positions need an even head_dim, not {head_dim} (mixer blockrec)"
        if self.numbers % 2 != 0:
            return f"update={self.update} is no number of conjugate pairs (mixer blockrec); say an even one"
        return None

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        heads, head_dim = self.sizes(width)
        inner = heads * head_dim
        scalars = heads if self.fuse == "scalar" else 0
        # What every token meets, what every state meets to be read, and what one update multiplies.
        side = 4 * width * inner + (1 if scalars else 2) * inner * width
        asked = (4 if self.update == "attend" else 2) * width * inner
        changing, changed = self._change_cost(width)
        params = side + scalars + asked + changing + 2 * self.states * width + width
        blocks = -(-length // self.window)
        slots = 2 * min(length, self.window) * inner * itemsize
        noted, written = self._noted(width, length, itemsize)
        state_bytes = slots + noted + self.states * (width + 2 * inner) * itemsize
        return Cost(
            params=params,
            flops=2 * length * side
            + 4 * inner * (self._pairs(length) + length * self.states)
            + blocks * 2 * self.states * asked
            + (blocks - 1) * changed,
            state_bytes=state_bytes,
            decode_bytes=params * itemsize + state_bytes + 2 * inner * itemsize + written,
        )

    def _change_cost(self, width: int) -> tuple[int, int]:
        """Weights of a change of the states, and FLOPs of one."""
        heads, head_dim = self.sizes(width)
        inner, states = heads * head_dim, self.states
        if isinstance(self.update, Form):
            numbers = states * self.numbers
            return states + numbers + (numbers + states) * width, 2 * numbers * self.window * width
        matrices = {"attend": 2 * inner, "gru": 6 * width, "fifo": 2 * width}[self.update] * width
        vectors = {"attend": 2, "gru": 4, "fifo": 1}[self.update] * width
        flops = 2 * (1 if self.update == "fifo" else states) * matrices
        if self.update == "attend":
            flops += 4 * inner * states * (states + self.window)
        return matrices + vectors, flops

    def _pairs(self, length: int) -> int:
        """Of tokens, masked ones included."""
        if self.local == "window" or length <= self.window:
            return attended_pairs(length, self.window)
        return -(-length // self.window) * self.window**2

    def _noted(self, width: int, length: int, itemsize: int) -> tuple[int, int]:
        """Bytes that are noted of a block's tokens, and those that one token writes of them."""
        if self.update == "attend":
            heads, head_dim = self.sizes(width)
            entry = heads * head_dim * itemsize
            return min(length, self.window) * entry, entry
        if self.update == "gru":
            return min(self.states, self.window) * width * itemsize, width * itemsize
        if isinstance(self.update, Form):
            filtered = (4 * self.states * self.numbers + itemsize) * width
            return filtered, filtered
        # The sum of a block stays in float32.
        return 4 * width, 4 * width

    def build(self, width: int, backend: Backend) -> Part:
        heads, head_dim = self.sizes(width)
        return Part(
            BlockRecurrence,
            width=width,
            heads=heads,
            head_dim=head_dim,
            window=self.window,
            apart=self.local == "chunk",
            weighed=self.fuse == "scalar",
            vectors=self._vectors(width, backend),
            operation=attention.window_form(backend),
        )

    def _vectors(self, width: int, backend: Backend) -> Part:
        heads, head_dim = self.sizes(width)
        norm = norm_part(width, backend)
        given = {"width": width, "heads": heads, "head_dim": head_dim, "states": self.states, "norm": norm}
        if self.update == "attend":
            return Part(AttendingStates, **given)
        if isinstance(self.update, Form):
            return Part(FilteredStates, **given, numbers=self.numbers)
        if self.update == "gru":
            return Part(GatedCache, **given, block=self.window, change_norm=norm)
        return Part(GatedQueue, **given, block=self.window)
