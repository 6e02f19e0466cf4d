"""A tiny checkpoint of a transformers class, written to disk, read by us, and held against the class itself."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from mixforge.checkpoints.checkpoint import Checkpoint, read

TOLERANCE = 1e-4
"""Of the RMS of their logits, in float32."""


def assert_same(config: PretrainedConfig, folder: Path, *, length: int = 41, seed: int = 0) -> Checkpoint:
    """Logits of a sequence, and of a prefill followed by single tokens, to 1e-4 of their RMS."""
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    theirs = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            # Norms at 1 and biases at 0 would hide a weight in the wrong place.
            weight.add_(
                0.1 * torch.randn_like(weight) * (weight.std() if weight.numel() > 1 else 1).clamp(min=0.2)
            )
    theirs.save_pretrained(folder)
    found = read(folder)
    ours = found.build()
    tokens_BT = torch.randint(0, config.vocab_size, (2, length))
    with torch.no_grad():
        expected = theirs(tokens_BT, use_cache=False).logits
        scale = expected.square().mean().sqrt()
        whole = ours(tokens_BT)
        assert (whole - expected).square().mean().sqrt() < TOLERANCE * scale
        half = length // 2
        last, state = ours.prefill(tokens_BT[:, :half], capacity=length)
        steps = [last]
        for t in range(half, length - 1):
            last, state = ours.step(tokens_BT[:, t], state)
            steps.append(last)
        stepped = torch.stack(steps, 1)
        assert (stepped - expected[:, half - 1 : -1]).square().mean().sqrt() < TOLERANCE * scale
    return found
