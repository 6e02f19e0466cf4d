"""A tiny checkpoint of a transformers class, written to disk, read by us, and held against the class itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from mixforge.checkpoints.checkpoint import Checkpoint, read

TOLERANCE = 1e-4
"""Of the RMS of their logits, in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Differences are of RMS, over the RMS of their logits."""

    checkpoint: Checkpoint
    sequence: float
    """Of the logits of a sequence."""
    steps: float
    """Of a prefill with half of it and single tokens after it."""


def assert_same(config: PretrainedConfig, folder: Path) -> Comparison:
    """Logits of a sequence, and of a prefill followed by single tokens, to 1e-4 of their RMS."""
    found = compare(config, folder)
    assert found.sequence < TOLERANCE, f"logits of a sequence differ by {found.sequence:.1e}"
    assert found.steps < TOLERANCE, f"logits of single tokens differ by {found.steps:.1e}"
    return found


def compare(config: PretrainedConfig, folder: Path, *, length: int = 41, seed: int = 0) -> Comparison:
    """Both models with one set of weights on the same tokens."""
    torch.manual_seed(seed)
    theirs = model_of(config)
    theirs.save_pretrained(folder)
    found = read(folder)
    ours = found.build()
    tokens_BT = torch.randint(0, config.vocab_size, (2, length))
    with torch.no_grad():
        expected = theirs(tokens_BT, use_cache=False).logits
        half = length // 2
        last, state = ours.prefill(tokens_BT[:, :half], capacity=length)
        steps = [last]
        for t in range(half, length - 1):
            last, state = ours.step(tokens_BT[:, t], state)
            steps.append(last)
        return Comparison(
            checkpoint=found,
            sequence=_difference(ours(tokens_BT), expected, expected),
            steps=_difference(torch.stack(steps, 1), expected[:, half - 1 : -1], expected),
        )


def model_of(config: PretrainedConfig) -> PreTrainedModel:
    """Their model with seeded weights, none of which is where it would hide in a wrong place."""
    config._attn_implementation = "eager"
    theirs = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            # Norms at 1 and biases at 0 would. Matrices as small as they start would leave gates and scores all alike.
            is_matrix = weight.numel() > max(weight.shape)
            size = 0.5 * weight.shape[-1] ** -0.5 if is_matrix else 0.1
            weight.add_(size * torch.randn_like(weight))
        for name, bias in theirs.named_buffers():
            if name.endswith("e_score_correction_bias"):
                bias.add_(0.1 * torch.randn_like(bias))
    return theirs


def _difference(ours: Tensor, theirs: Tensor, like: Tensor) -> float:
    return float((ours - theirs).square().mean().sqrt() / like.square().mean().sqrt())
