"""The module of the linear family, whose equations `mixers/linear.py` has.

A pass has four parts: `project` makes queries, keys and values of the input; `reads_of` makes of them what the
recurrence reads: decays, what is written and how strongly; `operation` or `one_step` is the recurrence; `finish` is
what follows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.kernels.dense import dense
from mixforge.kernels.norm import unit_norm
from mixforge.search_space.parts.decay import SigmoidDecay, SoftplusDecay, exact
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.first_state import CarriedState, NoisyState, PrefixState
from mixforge.search_space.parts.layer import Pass, TokenMixer, split_heads
from mixforge.search_space.parts.linear_output import GatedOutput, NormedOutput, ValueConvolution
from mixforge.search_space.parts.memories import Memories
from mixforge.search_space.parts.rotary import rotate
from mixforge.search_space.parts.short_convolution import ShortConvolution
from mixforge.search_space.parts.token_shift import TokenShift
from mixforge.search_space.parts.turn import Turn, turned
from mixforge.search_space.parts.write_gate import ExpGate, SigmoidGate, WriteStrength

State = dict[str, Tensor]


@dataclass
class Reads:
    """What one pass gives to the recurrence.

    decay: None, or log decays [H], [B, T, H] or [B, T, H, K].
    write_BTHV: the values as they are written, with a column of gates where the output is normalised.
    strength: beta [B, T, H] of the delta rule, the gates [B, T, H] of bare values, the log decays [B, T, H, V] of the
        values, or what rule=dplr removes.
    floor_BTH: what the normaliser is at least, for norm=max1 with in_gate=exp.
    angle: what turned queries and keys after the feature map.
    local_BTHV: what a convolution makes of the last values.
    """

    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTHV: Tensor
    write_BTHV: Tensor
    decay: Tensor | None = None
    strength: Tensor | None = None
    floor_BTH: Tensor | None = None
    angle: Tensor | None = None
    local_BTHV: Tensor | None = None


@dataclass
class Inputs:
    """The input [B, T, D] as each projection reads it: one and the same without a token shift.

    logits: those of gates, where they came with queries, keys and values.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    forget: Tensor
    write: Tensor
    out: Tensor
    logits: dict[nn.Module, Tensor] = field(default_factory=dict)

    def given(self, gate: nn.Module, name: str = "logit_BTH") -> dict[str, Tensor]:
        """The logits of a gate as an argument, if it has some already."""
        return {name: self.logits[gate]} if gate in self.logits else {}


class LinearAttention(TokenMixer):
    """One point of the family: what its genes leave out is None."""

    def __init__(
        self,
        width: int,
        heads: int,
        key_heads: int,
        key_dim: int,
        value_dim: int,
        features: int,
        scale: float,
        operation: Callable[..., tuple[Tensor, Tensor]],
        one_step: Callable[..., tuple[Tensor, Tensor]],
        conv: ShortConvolution | None,
        theta: float | None,
        feature: Callable[[Tensor], Tensor] | None,
        unit_keys: bool,
        decay: nn.Module | None,
        beta: nn.Module | None,
        dt_values: bool,
        normalised: bool,
        skip: nn.Module | None,
        output: nn.Module,
        spread: bool = False,
        act: Callable[[Tensor], Tensor] | None = None,
        turn: Turn | None = None,
        key: str = "own",
        latent: nn.Module | None = None,
        gated_keys: bool = False,
        tempered_keys: bool = False,
        gated_values: bool = False,
        value_decay: nn.Module | None = None,
        write_gate: nn.Module | None = None,
        exp_gate: nn.Module | None = None,
        value_gate: nn.Module | None = None,
        length_gate: nn.Module | None = None,
        floor: bool = False,
        blend: nn.Module | None = None,
        lends_values: bool = False,
        crosses: bool = False,
        bonus: nn.Module | None = None,
        late: nn.Module | None = None,
        local: ValueConvolution | None = None,
        beside: int = 0,
        memories: Memories | None = None,
        apart: nn.Module | None = None,
        copies: int = 1,
        levels: nn.Module | None = None,
        removal: nn.Module | None = None,
        shift: TokenShift | None = None,
        reads: list[str] | None = None,
        first: nn.Module | None = None,
        explored: NoisyState | CarriedState | None = None,
        prefix: PrefixState | None = None,
        least: float = 0.0,
        unit_inside: bool = False,
        gates_inside: bool = False,
        divides_inside: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.key_heads = heads, key_heads
        self.key_dim, self.value_dim, self.features = key_dim, value_dim, features
        self.scale = scale
        self.operation = operation
        self.one_step = one_step
        self.theta = theta
        self.spread = spread
        self.act = act
        self.feature = feature
        # What is added to every feature.
        self.least = least
        self.turn = turn
        self.unit_keys = unit_keys
        # Whether the operation over a sequence makes the lengths of queries and keys itself.
        self.unit_inside = unit_inside
        # Whether it multiplies the values by their gates, and puts the column of ones beside them.
        self.gates_inside = gates_inside
        # Whether the norm of a sequence's outputs divides them by their normaliser.
        self.divides_inside = divides_inside
        self.key = key
        self.dt_values = dt_values
        self.gated_keys, self.gated_values = gated_keys, gated_values
        self.tempered_keys = tempered_keys
        self.normalised = normalised
        self.floor = floor
        self.lends_values = lends_values
        self.crosses = crosses
        self.memories = memories
        self.apart = apart
        self.levels = levels
        # How many sets of queries, and of keys, values and gates, there are for the memories.
        self.copies_q, self.copies = 1 if apart is None else copies, copies
        self.states = heads if memories is None else heads * (1 + memories.count)
        keys, own = key_heads * key_dim, 1 if apart is not None else copies
        self.rows = [keys, 0 if key == "forget" else own * keys, own * heads * value_dim]
        self.widths = self.rows if apart is None else [copies * row for row in self.rows]
        self.mixed = Dense(width, sum(self.rows), bias=False)
        self.shift = shift
        self.reads = [] if reads is None else reads
        self.conv = conv
        self.decay = decay
        self.latent = latent
        self.value_decay = value_decay
        self.beta = beta
        self.write_gate = write_gate
        self.exp_gate = exp_gate
        self.value_gate = value_gate
        self.length_gate = length_gate
        self.blend = blend
        self.bonus = bonus
        self.late = late
        self.local = local
        # Columns of the state beside those of the values.
        self.beside = beside
        self.removal = removal
        self.first = first
        self.explored = explored
        self.prefix = prefix
        self.skip = skip
        self.output = output

    def initial_state(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> State:
        columns = self.value_dim + int(self.normalised) + self.beside
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        # One state, or one for each bit of the positions.
        bits = [] if self.levels is None else [capacity.bit_length()]
        shape = (batch, self.states, *bits, self.features, columns)
        state = {"matrix": torch.zeros(shape, device=device, dtype=exact)}
        if self.first is not None:
            state["matrix"].copy_(self.first(batch, columns))
        if self.conv is not None:
            state["conv"] = self.conv.initial_state(batch, device, dtype)
        if self.local is not None:
            state["local"] = self.local.initial_state(batch, device, dtype)
        if self.shift is not None:
            state["shift"] = self.shift.initial_state(batch, device, dtype)
        phase = None if self.turn is None else self.turn.initial_state(batch, device, exact)
        if phase is not None:
            state["phase"] = phase
        if self.latent is not None:
            # The logarithm of a sum of nothing.
            shape = (batch, self.key_heads, self.key_dim)
            state["latent"] = torch.full(shape, -torch.inf, device=device, dtype=exact)
        if self.exp_gate is not None:
            state["scale"] = torch.zeros(batch, self.heads, device=device, dtype=exact)
        return state

    def forward(self, x_BTD: Tensor, state: State | None, at: Pass) -> tuple[Tensor, State | None]:
        after: State = {}
        inputs = self.inputs_of(x_BTD, state, after, at)
        mixed_BTF = self.project(x_BTD, inputs)
        if self.conv is not None:
            mixed_BTF, after["conv"] = self.conv(mixed_BTF, None if state is None else state["conv"])
        read = self.reads_of(mixed_BTF, inputs, state, after, at, is_sequence=True)
        weight_BTE = self.routed(self.memories, read, inputs)
        if self.prefix is not None and at.start == 0:
            matrix: Tensor | None = self.read_together(self.prefix, read, inputs, at)
        else:
            matrix = self.first_matrix(read) if state is None else state["matrix"]
        if self.bonus is None:
            others: tuple[Tensor | float, ...] = (self.scale,) if self.unit_inside else ()
            if self.gates_inside:
                others = (self.normalised,)
            if self.levels is not None:
                others = (self.levels(inputs.write), at.start)
            o_BTHV, after["matrix"] = self.operation(
                read.q_BTHK, read.k_BTHK, read.write_BTHV, read.decay, read.strength, matrix, *others
            )
        else:
            o_BTHV, after["matrix"] = self.read_before_write(self.bonus, read, matrix)
        if self.explored is not None and self.training and state is None:
            self.explored.keep(after["matrix"])
        if self.memories is not None:
            o_BTHV = self.memories.joined(o_BTHV, weight_BTE)
        y_BTD = self.finish(o_BTHV, read, inputs, is_sequence=True)
        return y_BTD, None if state is None else after

    def step(self, x_BD: Tensor, state: State, at: Pass) -> tuple[Tensor, State]:
        after: State = {}
        inputs = self.inputs_of(x_BD[:, None], state, after, at)
        mixed_BF = self.project(x_BD[:, None], inputs)[:, 0]
        if self.conv is not None:
            mixed_BF = self.conv.step(mixed_BF, state["conv"])
        read = self.reads_of(mixed_BF[:, None], inputs, state, after, at)
        weight_BTE = self.routed(self.memories, read, inputs)
        decay, strength = read.decay, read.strength
        now = decay if decay is None or decay.dim() == 1 else decay[:, 0]
        before = state["matrix"]
        added_BHV = None
        if self.bonus is not None:
            group = self.heads // read.q_BTHK.shape[2]
            q_BHK = read.q_BTHK[:, 0].to(before.dtype).repeat_interleave(group, 1)
            added_BHV = (q_BHK[..., None, :] @ before)[..., 0, :].to(read.write_BTHV.dtype)
            added_BHV = added_BHV + self.bonus(read.q_BTHK, read.k_BTHK, read.write_BTHV)[:, 0]
        levels = () if self.levels is None else (self.levels(inputs.write)[:, 0], at.positions_T[0])
        o_BHV, after["matrix"] = self.one_step(
            read.q_BTHK[:, 0],
            read.k_BTHK[:, 0],
            read.write_BTHV[:, 0],
            now,
            None if strength is None else strength[:, 0],
            before,
            *levels,
        )
        o_BHV = o_BHV if added_BHV is None else added_BHV
        if self.memories is not None:
            o_BHV = self.memories.joined(o_BHV[:, None], weight_BTE)[:, 0]
        for name, tensor in after.items():
            if tensor is not state[name]:
                state[name].copy_(tensor)
        return self.finish(o_BHV[:, None], read, inputs)[:, 0], state

    def inputs_of(self, x_BTD: Tensor, state: State | None, after: State, at: Pass) -> Inputs:
        """The input of each projection, after the token shift if there is one."""
        found = {}
        if self.shift is not None:
            shifted, after["shift"] = self.shift(x_BTD, None if state is None else state["shift"])
            found = dict(zip(self.reads, shifted.unbind(), strict=True))
        if self.crosses:
            found["v"] = at.shared["context"][0]
        return Inputs(*(found.get(name, x_BTD) for name in ("q", "k", "v", "forget", "write", "out")))

    def project(self, x_BTD: Tensor, inputs: Inputs) -> Tensor:
        """Queries, keys and values [B, T, F]."""
        if self.shift is None and not self.crosses:
            mixed_BTF = self.read_at_once(inputs) if x_BTD.device.type == "cpu" else None
            return self.mixed(x_BTD) if mixed_BTF is None else mixed_BTF
        weights = torch.split(self.mixed.weight, self.rows)
        parts = [dense(x, w) for x, w in zip((inputs.q, inputs.k, inputs.v), weights, strict=True) if len(w)]
        return torch.cat(parts, -1)

    def read_at_once(self, inputs: Inputs) -> Tensor | None:
        """The logits of gates that read the same input by one product, where that is cheaper.

        On a CPU four columns alone take a third of what a hundred take. The weights are joined for it, which has to be
        little beside the product. Queries, keys and values come with them, and are returned, where nothing reads
        them that would be slower on rows that lie apart.
        """
        parts = (self.decay, self.beta, self.write_gate, self.exp_gate, self.output)
        # A loop, and not an expression with `:=`, which torch.compile refuses.
        gates: list[tuple[nn.Module, nn.Linear]] = []
        for part in parts:
            linear = reading(part)
            if part is not None and linear is not None:
                gates.append((part, linear))
        weights = [linear.weight for _, linear in gates]
        if len(gates) < 2 or sum(w.numel() for w in weights) > inputs.out.numel():
            return None
        is_whole = self.conv is None and self.act is None
        if is_whole:
            weights.append(self.mixed.weight)
        found = torch.split(dense(inputs.out, torch.cat(weights)), [len(weight) for weight in weights], -1)
        for (part, linear), logit in zip(gates, found, strict=False):
            inputs.logits[part] = logit if linear.bias is None else logit + linear.bias
        return found[-1] if is_whole else None

    def reads_of(
        self,
        mixed_BTF: Tensor,
        inputs: Inputs,
        state: State | None,
        after: State,
        at: Pass,
        *,
        is_sequence: bool = False,
    ) -> Reads:
        """Queries, keys and values by heads, then the gates, but for what the operation over a sequence does itself."""
        is_bare = is_sequence and self.unit_inside
        if self.apart is not None:
            mixed_BTF = self.apart(mixed_BTF, inputs.q, inputs.k)
        if self.act is not None:
            mixed_BTF = self.act(mixed_BTF)
        q, k, v = torch.split(mixed_BTF, self.widths, -1)
        q_BTHK = split_heads(q, self.key_heads * self.copies_q)
        v_BTHV = split_heads(v, self.heads * self.copies)
        k_BTHK = q_BTHK if self.key == "forget" else split_heads(k, self.key_heads * self.copies)
        if self.lends_values:
            at.shared["values"] = (v_BTHV,)
        if self.blend is not None:
            v_BTHV = self.blend(inputs.v, v_BTHV, at.shared["values"][0])
        decay = gate = None
        if self.decay is not None:
            decay, gate = self.decay(inputs.forget, k_BTHK, **inputs.given(self.decay))
        if self.latent is not None:
            decay, k_BTHK, after["latent"] = self.latent(k_BTHK, None if state is None else state["latent"])
            group = self.heads // self.key_heads
            decay = decay.repeat_interleave(group, 2)
            q_BTHK, k_BTHK = q_BTHK.softmax(-1), k_BTHK.to(q_BTHK.dtype)
        elif self.key == "forget":
            assert decay is not None
            k_BTHK = -torch.expm1(decay).to(q_BTHK.dtype)
        angle = None
        if self.turn is not None:
            angle, last = self.turn(
                inputs.forget, at.positions_T, None if state is None else state.get("phase")
            )
            if last is not None:
                after["phase"] = last
        q_BTHK = self.map_key(q_BTHK, at.positions_T, angle, is_gate=False, is_bare=is_bare)
        is_gate = self.key == "forget"
        k_BTHK = self.map_key(k_BTHK, at.positions_T, angle, is_gate=is_gate, is_bare=is_bare)
        if angle is not None and decay is not None and decay.dim() == 4:
            decay = torch.cat([decay, decay], -1)
        if not is_bare and self.scale != 1:
            q_BTHK = q_BTHK * self.scale
        read = Reads(q_BTHK, k_BTHK, v_BTHV, v_BTHV, decay, angle=angle)
        if self.local is not None:
            before = None if state is None else state["local"]
            read.local_BTHV, after["local"] = self.local(v_BTHV, before)
        self.gate_writes(read, gate, inputs, state, after, at, is_bare=is_sequence and self.gates_inside)
        return read

    def map_key(
        self, x_BTHK: Tensor, positions_T: Tensor, angle: Tensor | None, *, is_gate: bool, is_bare: bool
    ) -> Tensor:
        """Rotation, feature map, turn and norm of queries or keys; keys that are a gate are features already."""
        if self.theta is not None:
            x_BTHK = rotate(x_BTHK, positions_T, self.theta, self.spread)
        if self.feature is not None and not is_gate:
            x_BTHK = self.feature(x_BTHK) + self.least if self.least else self.feature(x_BTHK)
        if angle is not None:
            x_BTHK = turned(x_BTHK, angle)
        return unit_norm(x_BTHK) if self.unit_keys and not is_bare else x_BTHK

    def gate_writes(
        self,
        read: Reads,
        gate: Tensor | None,
        inputs: Inputs,
        state: State | None,
        after: State,
        at: Pass,
        *,
        is_bare: bool,
    ) -> None:
        """Gates of the values and the keys, and the write strength. `gate` is what came with the decay.

        Bare values are left as they are, and their gates are the strength.
        """
        dtype = read.v_BTHV.dtype
        write_BTHV = read.v_BTHV
        if self.value_gate is not None:
            write_BTHV = write_BTHV * self.value_gate(inputs.write)
        if self.beta is not None:
            read.strength = self.beta(inputs.write, **inputs.given(self.beta))
        if self.value_decay is not None:
            log_BTHV, _ = self.value_decay(inputs.forget, read.k_BTHK)
            if self.gated_values:
                write_BTHV = write_BTHV * -torch.expm1(log_BTHV).to(dtype)
            # The column of the normaliser follows the keys alone.
            read.strength = F.pad(log_BTHV, (0, int(self.normalised)))
        if self.normalised and not is_bare:
            write_BTHV = torch.cat([write_BTHV, torch.ones_like(write_BTHV[..., :1])], -1)
        factor = None
        if self.dt_values:
            factor = gate
        elif self.gated_values and self.value_decay is None:
            assert read.decay is not None
            factor = -torch.expm1(read.decay)
        elif self.write_gate is not None:
            factor = self.write_gate(inputs.write, **inputs.given(self.write_gate))
        elif self.exp_gate is not None:
            before = None if state is None else state["scale"]
            given = inputs.given(self.exp_gate)
            factor, read.decay, scale_BTH = self.exp_gate(inputs.write, read.decay, before, **given)
            after["scale"] = scale_BTH[:, -1]
            read.floor_BTH = (-scale_BTH).exp()
        if self.length_gate is not None:
            length = self.length_gate(at.positions_T)
            factor = length if factor is None else factor * length
        if is_bare:
            read.strength = None if factor is None else factor.expand(write_BTHV.shape[:3])
        elif factor is not None:
            write_BTHV = write_BTHV * factor[..., None].to(dtype)
        if self.gated_keys or self.value_decay is not None:
            group = self.heads // self.key_heads
            read.q_BTHK = read.q_BTHK.repeat_interleave(group, 2)
            read.k_BTHK = read.k_BTHK.repeat_interleave(group, 2)
        if self.gated_keys:
            assert read.decay is not None
            factor = gate if self.tempered_keys and gate is not None else -torch.expm1(read.decay)
            if factor.shape[-1] < self.features:
                factor = torch.cat([factor, factor], -1)
            read.k_BTHK = read.k_BTHK * factor.to(dtype)
        read.write_BTHV = write_BTHV
        if self.removal is not None:
            read.k_BTHK, read.strength = self.removal(inputs.write, read.k_BTHK)
            if read.decay is not None and read.decay.dim() < 4:
                read.decay = read.decay[..., None].expand(read.k_BTHK.shape)

    def routed(self, memories: Memories | None, read: Reads, inputs: Inputs) -> Tensor:
        """What each memory reads and is written, laid out as heads; gives the weights [B, T, E] of what they read."""
        if memories is None:
            return read.v_BTHV
        weight_BTE: Tensor = memories(inputs.write)
        each_BTH = weight_BTE.repeat_interleave(self.heads, 2)
        is_read_BTH = each_BTH > 0
        read.q_BTHK = memories.spread(read.q_BTHK, self.copies_q)
        read.k_BTHK = memories.spread(read.k_BTHK, self.copies)
        read.write_BTHV = memories.spread(read.write_BTHV, self.copies)
        factor_BTH = each_BTH if memories.is_shared else is_read_BTH
        if read.strength is None:
            read.write_BTHV = read.write_BTHV * factor_BTH[..., None].to(read.write_BTHV.dtype)
        else:
            read.strength = memories.spread(read.strength, self.copies) * factor_BTH
        if read.decay is not None:
            fixed = read.decay.dim() == 1
            decay = read.decay.expand(*weight_BTE.shape[:2], -1) if fixed else read.decay
            decay = memories.spread(decay, 1 if fixed else self.copies)
            keeps = ~is_read_BTH if decay.dim() == 3 else ~is_read_BTH[..., None]
            read.decay = decay.masked_fill(keeps, 0)
        return weight_BTE

    def first_matrix(self, read: Reads) -> Tensor | None:
        """The state before the first token of a training sequence; None for zeros."""
        batch, columns = len(read.write_BTHV), self.value_dim + int(self.normalised) + self.beside
        if self.first is not None:
            matrix: Tensor = self.first(batch, columns)
            return matrix
        if self.explored is None or not self.training:
            return None
        drawn: Tensor = self.explored(batch, read.v_BTHV.device)
        return drawn

    def read_together(self, prefix: PrefixState, read: Reads, inputs: Inputs, at: Pass) -> Tensor:
        """The state [B, H, K, V] that the tokens of a prefix write, before the first of them reads."""
        k, v = prefix(inputs.k, inputs.v)
        angle = None if read.angle is None else read.angle[..., : prefix.length, :, :]
        positions_T = at.positions_T[: prefix.length]
        k_BTHK = self.map_key(
            split_heads(k, self.key_heads), positions_T, angle, is_gate=False, is_bare=False
        )
        v_BTHV = split_heads(v, self.heads)
        if self.normalised:
            v_BTHV = F.pad(v_BTHV, (0, 1), value=1)
        k_BTHK = k_BTHK.repeat_interleave(self.heads // self.key_heads, 2)
        matrix = exact(k_BTHK).permute(0, 2, 3, 1) @ exact(v_BTHV).transpose(1, 2)
        return F.pad(matrix, (0, self.beside))

    def read_before_write(
        self, bonus: nn.Module, read: Reads, matrix: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """o_t = S_{t-1}^T q_t + bonus: the recurrence with everything but its queries one token later."""
        decay = read.decay
        if decay is not None and decay.dim() == 1:
            decay = decay.expand(*read.v_BTHV.shape[:3])
        # Before the first token stands one that writes nothing and forgets nothing.
        later = (0, 0, 0, 0, 1, 0)
        o_BTHV, matrix = self.operation(
            F.pad(read.q_BTHK, (0, 0, 0, 0, 0, 1)),
            F.pad(read.k_BTHK, later),
            F.pad(read.write_BTHV, later),
            None if decay is None else F.pad(decay, later if decay.dim() == 4 else later[2:]),
            None,
            matrix,
        )
        return o_BTHV[:, :-1] + bonus(read.q_BTHK, read.k_BTHK, read.write_BTHV), matrix

    def finish(self, o_BTHV: Tensor, read: Reads, inputs: Inputs, *, is_sequence: bool = False) -> Tensor:
        """Normaliser, skip, norm, gate and output projection."""
        given = inputs.given(self.output, "logit_BTF")
        if self.normalised:
            o_BTHV = exact(o_BTHV)
            least = None
            if self.floor:
                least = o_BTHV.new_ones(()) if read.floor_BTH is None else read.floor_BTH[..., None]
            if is_sequence and self.divides_inside and least is not None:
                given["least_BTH1"] = least
            else:
                o_BTHV, total = torch.split(o_BTHV, [self.value_dim, 1], -1)
                total = total if least is None else total.abs().clamp(min=least)
                # Not a quotient, whose adjoint divides three times.
                o_BTHV = (o_BTHV * (total + 1e-6).reciprocal()).to(read.v_BTHV.dtype)
        if self.skip is not None:
            o_BTHV = o_BTHV + self.skip(read.v_BTHV)
        if read.local_BTHV is not None:
            o_BTHV = o_BTHV + read.local_BTHV
        late = () if self.late is None else (self.late(read.q_BTHK, read.k_BTHK, read.v_BTHV),)
        y: Tensor = self.output(o_BTHV, inputs.out, *late, **given)
        return y


def reading(part: nn.Module | None) -> nn.Linear | None:
    """The layer whose logits a gate takes in the place of the input, if it takes them."""
    match part:
        case SoftplusDecay():
            return part.step_size
        case SigmoidDecay() | WriteStrength() | SigmoidGate() | ExpGate():
            return part.logit
        case NormedOutput() | GatedOutput():
            return part.gate if isinstance(part.gate, nn.Linear) else None
    return None
