"""Zamba2: Mamba-2, with a transformer block of the stream and the embeddings before some of its layers.

In place l the block's output y_l goes into Mamba-2 alone:

    x + mamba2(norm(x + y_l)),  y_l = W_l mlp_l(norm(attn_l(norm([x; e]))))

The blocks share their weights, but for adapters of low rank in every place. Here each place has weights of its own, with
its adapters in them, and W_l is in what ends the feed-forward layer. Scores are divided by sqrt(K / 2), which is in the
queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from mixforge.checkpoints.config import Config
from mixforge.checkpoints.draft import Draft, Tensors, pointwise
from mixforge.checkpoints.layers import Genes, Layer, call, duality, finish, rope

# Of the norm in Mamba-2's block, whatever the configuration says of the others.
GATED_NORM_EPS = 1e-5
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}


class _Blocks:
    """The blocks' weights, which are stored where each is applied first, by the places where they are applied."""

    def __init__(self, tensors: Tensors, layers: list[int], count: int) -> None:
        self.tensors = tensors
        self.prefixes = [f"model.layers.{layer}.shared_transformer" for layer in layers[:count]]
        for layer in layers[count:]:
            # The same weights again, in files that keep both.
            tensors.drop_all(f"model.layers.{layer}.shared_transformer.")
        self.taken: dict[str, Tensor] = {}

    def weight(self, place: int, name: str, adapters: str | None = None) -> Tensor:
        """Of the block in this place, with what its adapter of low rank adds there, where there is one."""
        prefix = self.prefixes[place % len(self.prefixes)]
        stored = f"{prefix}.{name}.weight"
        if stored not in self.taken:
            self.taken[stored] = self.tensors.take(stored).float()
        adapter = f"{prefix}.{adapters}.{place}"
        if adapters is None or f"{adapter}.0.weight" not in self.tensors:
            return self.taken[stored]
        down, up = (self.tensors.take(f"{adapter}.{half}.weight").float() for half in (0, 1))
        return self.taken[stored] + up @ down


def _attention(config: Config, blocks: _Blocks, place: int) -> Layer:
    width, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    genes: Genes = {
        "reads": "embeddings",
        "heads": heads,
        "head_dim": 2 * width // heads,
        "kv": f"gqa({config.whole('num_key_value_heads', heads)})",
        **(rope(config) if config.flag("use_mem_rope", False) else {"pos": "none"}),
    }
    q, k, v = (
        blocks.weight(place, f"self_attn.{name}_proj", f"self_attn.linear_{name}_adapter_list")
        for name in "qkv"
    )
    weights = {
        "norm.weight": blocks.weight(place, "input_layernorm"),
        "inner.queries.query.weight": math.sqrt(2) * q,
        "inner.memory.key.weight": k,
        "inner.memory.value.weight": v,
        "inner.output.out.weight": blocks.weight(place, "self_attn.o_proj"),
    }
    return call("attn", genes), weights


def _feed_forward(config: Config, blocks: _Blocks, place: int, last: Tensor) -> Layer:
    both = blocks.weight(place, "feed_forward.gate_up_proj", "feed_forward.gate_up_proj_adapter_list")
    gate, up = both.chunk(2)
    out = last.float() @ blocks.weight(place, "feed_forward.down_proj")
    genes = {
        "act": config.choice("hidden_act", ACTIVATIONS, "gelu"),
        "expand": len(up) / config.whole("hidden_size"),
    }
    return call("glu", genes), pointwise({"gate.weight": gate, "up.weight": up, "out.weight": out})


def _mamba2(config: Config, tensors: Tensors, prefix: str) -> Layer:
    return duality(
        tensors,
        prefix,
        heads=config.whole("n_mamba_heads"),
        groups=config.whole("mamba_ngroups", 1),
        states=config.whole("mamba_d_state"),
    )


def _inside(unit: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A mixer's weights as those of one of several in a residual."""
    return {f"{unit}.mixer.{name}": value for name, value in weights.items()}


def _convert(config: Config, tensors: Tensors) -> Draft:
    draft = Draft()
    # What the class has where its configuration says nothing.
    config = Config({"tie_word_embeddings": True, "rms_norm_eps": GATED_NORM_EPS, **config.values})
    config.must("rms_norm_eps", GATED_NORM_EPS, "the norm in Mamba-2's block has it")
    config.must("add_bias_linear", False, "the projections have no biases")
    config.must("use_long_context", False, "theta is one number")
    layers = range(config.whole("num_hidden_layers"))
    hybrid = [layer for layer in layers if f"model.layers.{layer}.linear.weight" in tensors]
    blocks = _Blocks(tensors, hybrid, config.whole("num_mem_blocks", 1))
    for layer in layers:
        prefix = f"model.layers.{layer}"
        if layer not in hybrid:
            text, weights = _mamba2(config, tensors, f"{prefix}.mamba")
            draft.add(text, weights, before=tensors.norm(f"{prefix}.input_layernorm"))
            continue
        place = hybrid.index(layer)
        attn, of_attn = _attention(config, blocks, place)
        glu, of_glu = _feed_forward(config, blocks, place, tensors.take(f"{prefix}.linear.weight"))
        mamba2, of_mamba2 = _mamba2(config, tensors, f"{prefix}.mamba_decoder.mamba")
        draft.add_unit(
            f"residual(residual({attn} + {glu}) + {mamba2})",
            {
                **_inside("body.units.0.body.units.0", of_attn),
                "body.units.0.body.units.1.before.weight": blocks.weight(place, "pre_ff_layernorm"),
                **_inside("body.units.0.body.units.1", of_glu),
                "body.units.1.before.weight": tensors.norm(f"{prefix}.mamba_decoder.input_layernorm"),
                **_inside("body.units.1", of_mamba2),
            },
        )
    return finish(draft, config, tensors, norm="model.final_layernorm")


MODEL_TYPES: dict[str, Callable[[Config, Tensors], Draft]] = {"zamba2": _convert}
