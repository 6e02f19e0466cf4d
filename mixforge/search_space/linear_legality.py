"""Which genes of `linear` do not go together, and what to say instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mixforge.search_space.genes import Form
from mixforge.search_space.parts.linear_points import TAYLOR

if TYPE_CHECKING:
    from mixforge.search_space.mixers.linear import Linear, Sizes

# Feature maps whose features are never negative, beside taylor(2).
POSITIVE = ("elu1", "relu", "exp", "softmax", "learned", "hedgehog", "favor", "outer")


def why_unfit(mixer: Linear, size: Sizes) -> str | None:
    """A sentence on the first genes that do not go together; None where all do."""
    return (
        _why_no_prefix(mixer)
        or _why_no_levels(mixer)
        or _why_no_memories(mixer)
        or _why_uneven(mixer, size)
        or _why_ungated(mixer)
        or _why_no_keys(mixer, size)
    )


def _why_uneven(mixer: Linear, size: Sizes) -> str | None:
    """A rule, a norm or a read that the rest does not fit."""
    if mixer.rule == "delta" and not mixer.unit_keys:
        return "rule=delta needs keys of length 1: leave qk_norm out or say qk_norm=l2"
    no_slots = _why_no_slots(mixer, mixer.rule) if isinstance(mixer.rule, Form) else None
    if no_slots is not None:
        return no_slots
    if mixer.rule == "second" and mixer.in_gate == "exp":
        return "in_gate=exp keeps a scale of what is written alone, so it needs rule=add or delta, not second"
    if mixer.rule == "dplr" and size.key_heads != size.heads:
        return f"rule=dplr has a removal key for each of {size.heads} heads: leave key_heads out"
    if mixer.normalised and mixer.rule in ("delta", "dplr"):
        return f"norm={mixer.norm} needs rule=add: under rule={mixer.rule} the sum of weights may be 0"
    if mixer.norm == "denominator" and mixer.phi != TAYLOR and mixer.phi_name not in POSITIVE:
        return f"norm=denominator needs positive features: phi={', '.join(POSITIVE)} or taylor(2); or say norm=max1"
    if mixer.norm == "denominator" and mixer.pos in ("lrpe", "phase"):
        return f"norm=denominator needs positive features, and pos={mixer.pos} turns them; say norm=max1"
    if mixer.decay == "both" and mixer.rule != "add":
        return f"decay=both needs rule=add: there is no chunked form of it for rule={mixer.rule}"
    if mixer.skip == "bonus" and (
        mixer.rule != "add" or mixer.decay == "both" or mixer.key == "latent" or mixer.in_gate == "exp"
    ):
        return (
            "skip=bonus reads the state before it is written: it needs rule=add, and neither decay=both, "
            "key=latent nor in_gate=exp"
        )
    if mixer.skip == "late" and mixer.out_norm in ("joint", "simple", "gated", "grouped"):
        return f"skip=late is added after the norm of each head: say out_norm=rms, group or none, not {mixer.out_norm}"
    if mixer.out_gate == "inner" and isinstance(mixer.gate_rank, str):
        return "out_gate=inner is W_2 sigmoid(W_1 x): say its rank, such as gate_rank=128"
    return None


def _why_no_prefix(mixer: Linear) -> str | None:
    """What a state that the first tokens write together does not fit."""
    if not mixer.prefix:
        return None
    if isinstance(mixer.rule, Form) or mixer.memories != "none":
        given = f"rule={mixer.rule}" if isinstance(mixer.rule, Form) else f"memories={mixer.memories}"
        return (
            f"init={mixer.init} writes keys to one state of each head, and {given} has others: say init=zero"
        )
    if mixer.key == "latent":
        return f"key=latent begins with keys whose weights sum to 1, and init={mixer.init} adds to them: say init=zero"
    if mixer.pos == "xpos":
        return f"pos=xpos grades earlier tokens by their distance, and init={mixer.init} reads later ones: say pos=rope"
    return None


def _why_no_levels(mixer: Linear) -> str | None:
    """Levels of a state that the rest does not fit."""
    if mixer.levels == "one":
        return None
    if mixer.rule not in ("add", "delta") or mixer.decay not in ("head", "layer", "scalar"):
        return (
            f"levels=log needs rule=add or delta and decay=head, layer or scalar, not rule={mixer.rule}, "
            f"decay={mixer.decay}"
        )
    if mixer.skip == "bonus" or mixer.memories != "none" or mixer.init != "zero":
        return "levels=log needs memories=none, init=zero and another skip than bonus"
    return None


def _why_no_memories(mixer: Linear) -> str | None:
    """Memories that the rest does not fit."""
    if isinstance(mixer.memories, str):
        return None
    count, top_k = (int(each) for each in mixer.memories.arguments)
    if top_k > count:
        return f"memories={mixer.memories} has {count} memories, of which a token cannot have {top_k}"
    if mixer.rule not in ("add", "delta") or mixer.decay == "both" or mixer.key != "own":
        return f"memories={mixer.memories} needs rule=add or delta, key=own and another decay than both"
    if mixer.normalised or mixer.skip != "none" or mixer.values != "plain" or mixer.in_gate == "exp":
        return (
            f"memories={mixer.memories} needs norm=none or length, skip=none, values=plain and another in_gate "
            f"than exp"
        )
    if mixer.turns or mixer.phi_name in ("learned", "hedgehog", "outer", "favor"):
        return (
            f"memories={mixer.memories} has more keys than queries: say pos=none, rope or xpos, and a feature map "
            f"without a matrix"
        )
    return None


def _why_no_slots(mixer: Linear, rule: Form) -> str | None:
    """Slots that the rest does not fit."""
    if mixer.decay != "channel" or mixer.forget_form == "key" or mixer.key != "own":
        return (
            f"rule={rule} has a decay for each slot: say decay=channel, and neither forget=key nor key=forget"
        )
    if mixer.normalised or mixer.skip == "bonus" or mixer.in_gate not in ("none", "sigmoid"):
        return (
            f"rule={rule} writes 1 - decay and reads by a softmax: it needs norm=none or length, in_gate=none or "
            f"sigmoid, and another skip than bonus"
        )
    return f"rule={rule} does not turn its slots: say pos=none, rope or xpos" if mixer.turns else None


def _why_ungated(mixer: Linear) -> str | None:
    """A gate that the decay does not have."""
    form = mixer.forget_form
    if mixer.in_gate == "dt" and (mixer.decay != "scalar" or form != "softplus"):
        return "in_gate=dt needs the dt of decay=scalar, forget=softplus"
    if mixer.in_gate == "exp" and not mixer.normalised:
        return "in_gate=exp has no bound, so it needs norm=max1 or norm=denominator"
    if mixer.in_gate == "exp" and mixer.by_channel:
        return (
            "in_gate=exp keeps one scale for each head, so it needs decay=none, head, layer or scalar, "
            f"not {mixer.decay}"
        )
    if mixer.in_gate == "tied" and not mixer.gated_decay:
        return "in_gate=tied is 1 - decay: it needs decay=scalar, channel or both"
    if mixer.in_gate in ("tied", "tempered") and mixer.by_channel and mixer.rule == "delta":
        return f"in_gate={mixer.in_gate} scales keys, and rule=delta needs keys of length 1: say rule=add"
    if mixer.in_gate == "tempered" and (form != "tempered" or not mixer.gated_decay):
        return "in_gate=tempered belongs to decay=channel, forget=tempered: say them too"
    if mixer.gated_decay and form == "tempered" and mixer.decay != "channel":
        return f"forget=tempered needs decay=channel, not {mixer.decay}"
    if mixer.decay == "both" and form == "key":
        return "forget=key has no decay of the values: say decay=channel"
    return None


def _why_no_keys(mixer: Linear, size: Sizes) -> str | None:
    """Keys that cannot be made so."""
    form = mixer.forget_form
    if mixer.by_channel and form == "key" and size.channels != size.key_dim:
        return (
            f"forget=key has a decay for each of {size.key_dim} key channels, and phi={mixer.phi} makes "
            f"{size.channels}: say decay=scalar or a map that keeps the channels"
        )
    if mixer.key == "forget":
        if not mixer.by_channel:
            return "key=forget takes its keys from decay=channel or both: say one of them"
        if form == "key":
            return "key=forget and forget=key would each follow from the other: give one of them up"
        if form == "learned":
            return "key=forget makes keys of decays, and those of forget=learned are the same for all tokens: say another"
        if mixer.in_gate in ("tied", "tempered"):
            return f"key=forget has a gate in its keys already: leave in_gate={mixer.in_gate} out"
        if size.key_heads != size.heads:
            return f"key=forget has a key for each of {size.heads} heads: leave key_heads out"
        if mixer.pos in ("rope", "xpos"):
            return (
                f"key=forget has gates for keys, which pos={mixer.pos} does not rotate: say pos=lrpe or none"
            )
    if mixer.key == "latent":
        if mixer.decay != "none" or mixer.rule != "add" or mixer.pos != "none" or mixer.phi != "none":
            return "key=latent makes keys and decay: it needs rule=add, decay=none, phi=none and pos=none"
        if mixer.unit_keys or mixer.normalised or mixer.in_gate != "none":
            return "key=latent has weights that sum to 1: it needs norm=none or length, qk_norm=none and in_gate=none"
    return None
