"""Famous points of the linear family by their short names, and where they depart from their papers.

None has biases in its projections and, but for bias=conv, in its convolution; sizes of heads are genes, not
equations.

  retnet    Sun et al. 2023 (arXiv 2307.08621), equations 6 to 8. The norm of a head is RMS with a learned scale;
            the frequencies are those of rotary position; outputs are not divided by a sum of decays. pos=xpos has
            the frequencies of the paper's code.
  gret      Sun et al. 2024 (arXiv 2405.05254): retention whose decay is sigmoid(W x)^(1/16); group norm.
  gla       Yang et al. 2023 (arXiv 2312.06635), section 4.4. RMS norm in the place of layer norm.
  lightning MiniMax 2025 (arXiv 2501.08313) and Qin et al. 2023 (arXiv 2307.14995). The decay counts the layers
            that mix tokens.
  hgrn2     Qin et al. 2024 (arXiv 2404.07904). The bounds of the layers are learned apart, layer l of L between l/L
            and (l+1)/L, where the paper takes sums of a softmax over the layers; log D_t >= -5.
  deltanet  Yang et al. 2024 (arXiv 2406.06484), section 3.4.
  gdn       Yang et al. 2024 (arXiv 2412.06464), equation 10. Values are as wide as keys.
  kda       Kimi Team 2025 (arXiv 2510.26692), section 3. The output gate has full rank; log D_t >= -5.
  mamba2    Dao and Gu 2024 (arXiv 2405.21060), section 7. P = 2 width/heads and N = 64.
  mlstm     Beck et al. 2024 (arXiv 2405.04517), section 2.3, in the block of Beck et al. 2025 (arXiv 2503.13427): no
            convolution, keys half as wide as values. The recurrence is run as e^-m S, whose decay and gate are
            at most 1.
  rwkv5     Peng et al. 2024 (arXiv 2404.05892), Eagle. log D >= -5.
  rwkv6     Peng et al. 2024 (arXiv 2404.05892), Finch. One rank, 32, for all shifts; log D_t >= -5.
  rwkv7     Peng et al. 2025 (arXiv 2503.14456), Goose. The first of its layers has values=own, the others values=shared.
            Ranks are 64 for decays and rates, 32 for the shared values and 128 for the gate; the group norm's epsilon
            is 1e-5; weights start as in `parts/removal_keys` and `parts/decay`.
            With values=context it is the state-driven heads of WuNeng, Liu et al. 2025 (arXiv 2504.19191): what its
            attention heads say is what they write.
  gsa       Zhang et al. 2024 (arXiv 2409.07146), with 64 slots. The decays have a bias; log alpha_t >= -5.
  hla2      Zhang, Qin and Gu 2025 (arXiv 2510.27258), without a decay or a sum to divide by. One state less, see
            `kernels/second_order`.
  mom       Du et al. 2025 (arXiv 2502.13685) over gdn, of four memories two, see `parts/memories`.
  based     The linear layer of Arora et al. 2024 (arXiv 2402.18668). Each product k_i k_j, i != j, is kept once,
            weighed by sqrt(2), and not twice: the same function with about half the state.
  gateloop  Katsch 2023 (arXiv 2311.01927). Heads have a state of K by V, where the paper's models have 1 by 1; only
            the real part is normed and gated; log |a_t| >= -5.
  latte     Dolga et al. 2024 (arXiv 2402.17512). log D_t >= -5 (see LatentDecay).
  rodimus   He et al. 2024 (arXiv 2410.06577). Queries, keys and gates read the layer's input and not the convolved
            one; values are convolved before their gate; log D_t >= -5.
"""

from __future__ import annotations

from collections.abc import Mapping

from mixforge.search_space.genes import Form, GeneValue

TAYLOR = Form("taylor", (2,))
SIGMOID = Form("sigmoid", (1,))

POINTS: Mapping[str, Mapping[str, GeneValue]] = {
    "retnet": {"decay": "head", "pos": "rope", "conv": "none", "value_dim": "double"},
    "gret": {
        "decay": "scalar",
        "forget": "sigmoid",
        "pos": "rope",
        "conv": "none",
        "out_norm": "group",
    },
    "gla": {"decay": "channel", "forget": "sigmoid", "conv": "none", "key_dim": "half"},
    "lightning": {
        "decay": "layer",
        "conv": "none",
        "act": "silu",
        "out_norm": "joint",
        "out_gate": "sigmoid",
    },
    "hgrn2": {
        "decay": "channel",
        "forget": "bounded",
        "key": "forget",
        "phi": "silu",
        "conv": "none",
        "out_norm": "gated",
        "out_gate": "none",
    },
    "deltanet": {"rule": "delta", "out_gate": "none"},
    "gdn": {"rule": "delta", "decay": "scalar"},
    "kda": {"rule": "delta", "decay": "channel", "out_gate": "sigmoid"},
    "mamba2": {
        "decay": "scalar",
        "in_gate": "dt",
        "skip": "head",
        "out_norm": "gated",
        "key_heads": 1,
        "key_dim": 64,
        "value_dim": "double",
    },
    "mlstm": {
        "decay": "scalar",
        "forget": SIGMOID,
        "in_gate": "exp",
        "norm": "max1",
        "conv": "none",
        "out_norm": "group",
        "out_gate": "sigmoid",
        "key_dim": "half",
    },
    "rwkv5": {
        "decay": "channel",
        "forget": "learned",
        "skip": "bonus",
        "shift": "lerp",
        "conv": "none",
        "out_norm": "group",
    },
    "rwkv6": {
        "decay": "channel",
        "forget": "exp",
        "skip": "bonus",
        "shift": "lowrank",
        "conv": "none",
        "out_norm": "group",
    },
    "rwkv7": {
        "rule": "dplr",
        "decay": "channel",
        "forget": "capped",
        "skip": "late",
        "shift": "lerp",
        "conv": "none",
        "out_norm": "group",
        "out_gate": "inner",
        "gate_rank": 128,
    },
    "gsa": {
        "rule": Form("slots", (64,)),
        "decay": "channel",
        "forget": Form("sigmoid", (8,)),
        "forget_rank": "full",
        "conv": "none",
        "act": "silu",
        "out_norm": "gated",
        "out_gate": "self",
    },
    "hla2": {"rule": "second", "conv": "none", "out_gate": "none"},
    "mom": {"rule": "delta", "decay": "scalar", "memories": Form("top", (4, 2))},
    "based": {
        "phi": TAYLOR,
        "norm": "denominator",
        "key_dim": 16,
        "conv": "none",
        "out_norm": "none",
        "out_gate": "none",
    },
    "gateloop": {
        "decay": "channel",
        "forget": SIGMOID,
        "forget_rank": "full",
        "pos": "phase",
        "conv": "none",
        "out_norm": "group",
    },
    "latte": {"key": "latent", "conv": "none", "out_norm": "none", "out_gate": "none"},
    "rodimus": {
        "decay": "channel",
        "forget": "tempered",
        "in_gate": "tempered",
        "qk_norm": "l2",
        "value_gate": 16,
        "skip": "channel",
        "out_norm": "gated",
        "heads": 1,
        "key_dim": 64,
        "value_dim": "double",
        "bias": "conv",
    },
}
