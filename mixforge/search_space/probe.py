"""One gradient through a small model of an architecture: whether it reaches every weight, and how strongly.

Deep stacks lose or blow up the gradient before they lose anything else, and it costs seconds to see. The stack is kept
as it is; the width, which says little about it, is made small. Two passes with one step of Adam between them: a
projection that starts at zero hides the weights behind it from the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mixforge.search_space.architecture import Architecture
from mixforge.search_space.enlargement import GROWTHS, at_width
from mixforge.search_space.model import LanguageModel
from mixforge.search_space.parts.residual import Residual, ResidualStack

WIDTHS = (32, 48, 64, 96, 128, 192, 256)
MOST_PARAMS = 30_000_000
MOST_PREFIX = 2048
VOCAB = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """What one training step showed."""

    width: int
    """Of the model that was built."""
    length: int
    is_finite: bool
    """The loss, and every gradient."""
    is_causal: bool
    """Whether a change of the last token, which is in no prefix, left all logits before it as they were."""
    dead: tuple[str, ...]
    """Weights that no gradient reached in either pass."""
    ratio: float
    """The gradient's root mean square after the first unit over that after the last."""


def probe(architecture: Architecture, length: int = 48, seed: int = 0) -> Flow:
    """Build it small, on the CPU in float32, and train it for one step on `length` random tokens behind its prefix.

    Raises ValueError where it is illegal, has more than MOST_PARAMS parameters at its narrowest or a prefix of more than
    MOST_PREFIX tokens.
    """
    small = _narrowed(architecture)
    if small.prefix > MOST_PREFIX:
        raise ValueError(
            f"it has a prefix of {small.prefix} tokens, and a gradient is sent behind at most {MOST_PREFIX}: "
            "say a shorter prefix, which has the same weights, or leave out --flow"
        )
    length += small.prefix
    model = small.build("torch", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(small.vocab, (2, length), generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    reached: set[str] = set()
    ratio, is_finite = math.nan, True
    for _ in range(2):
        optimizer.zero_grad()
        # In training mode some layers draw by chance, from torch's own generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            loss, ratio = _pass(model, tokens_BT)
        for name, weight in model.named_parameters():
            if weight.grad is not None and bool(weight.grad.any()):
                reached.add(name)
            is_finite &= weight.grad is None or bool(weight.grad.isfinite().all())
        is_finite &= math.isfinite(loss)
        if not is_finite:
            break
        optimizer.step()
    dead = tuple(name for name, _ in model.named_parameters() if name not in reached)
    return Flow(
        width=small.width,
        length=length,
        is_finite=is_finite and math.isfinite(ratio),
        is_causal=_is_causal(model.eval(), tokens_BT),
        dead=dead,
        ratio=ratio,
    )


def _narrowed(architecture: Architecture) -> Architecture:
    """The stack at the first legal small width, with few tokens; at its own where none is."""
    reason = architecture.why_illegal()
    if reason is not None:
        raise ValueError(f"it cannot be built: {reason}")
    for width in (*(each for each in WIDTHS if each < architecture.width), architecture.width):
        for grow in GROWTHS:
            found = at_width(architecture.replace(vocab=min(architecture.vocab, VOCAB)), width, grow)
            if found is not None and found.illegality() is None:
                params = found.cost(1).params
                if params > MOST_PARAMS:
                    raise ValueError(
                        f"it has {params} parameters at width {width}, and a gradient is sent through at most "
                        f"{MOST_PARAMS}: say a smaller one, or leave out --flow"
                    )
                return found
    raise AssertionError("an architecture is legal at its own width")


def _pass(model: LanguageModel, tokens_BT: Tensor) -> tuple[float, float]:
    """The loss, and the gradient's ratio between the first unit and the last."""
    outputs: list[Tensor] = []

    def keep(unit: torch.nn.Module, given: object, made: tuple[Tensor, object]) -> None:
        made[0].retain_grad()
        outputs.append(made[0])

    units = [module for module in model.stack.modules() if isinstance(module, Residual | ResidualStack)]
    hooks = [unit.register_forward_hook(keep) for unit in units]
    first = max(1, model.prefix)
    logits_BTX = model(tokens_BT)[:, first - 1 : -1]
    loss = F.cross_entropy(logits_BTX.flatten(0, 1), tokens_BT[:, first:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    for hook in hooks:
        hook.remove()
    sizes = [float(output.grad.square().mean().sqrt()) for output in outputs if output.grad is not None]
    # Where tokens halt, nothing is asked of the last applications of a unit.
    asked = [size for size in sizes if size]
    return float(loss.detach()), asked[0] / asked[-1] if asked else math.inf


@torch.no_grad()
def _is_causal(model: LanguageModel, tokens_BT: Tensor) -> bool:
    changed_BT = tokens_BT.clone()
    changed_BT[:, -1] = (changed_BT[:, -1] + 1) % model.vocab
    before, after = model(tokens_BT)[:, :-1], model(changed_BT)[:, :-1]
    return bool(torch.allclose(before, after, rtol=1e-4, atol=1e-5))
