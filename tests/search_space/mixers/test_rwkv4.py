"""RWKV-4's time mixing against its paper's sums (arXiv 2305.13048, equations 11 to 15), in float64."""

from __future__ import annotations

import torch

from mixforge.search_space.mixers.rwkv4 import Rwkv4
from mixforge.search_space.parts.layer import Pass

WIDTH, LENGTH = 12, 21


@torch.no_grad()
def test_output_is_the_weighted_average_of_all_values() -> None:
    torch.manual_seed(0)
    module = Rwkv4().build(WIDTH, "torch").build().double()
    for weight in module.parameters():
        weight += 0.2 * torch.randn_like(weight)
    w = dict(module.named_parameters())
    x = torch.randn(LENGTH, WIDTH, dtype=torch.float64)
    rows: dict[str, list[torch.Tensor]] = {"receptance": [], "key": [], "value": []}
    for t in range(LENGTH):
        past = x[t - 1] if t > 0 else torch.zeros(WIDTH, dtype=torch.float64)
        for number, name in enumerate(("receptance", "key", "value")):
            mu = 1 - w["shift.share"][number]
            rows[name].append(w[f"{name}.weight"] @ (mu * x[t] + (1 - mu) * past))
    expected = []
    decay = torch.exp(w["decay"])
    for t in range(LENGTH):
        above = torch.exp(w["bonus"] + rows["key"][t]) * rows["value"][t]
        below = torch.exp(w["bonus"] + rows["key"][t])
        for i in range(t):
            weight = torch.exp(-(t - 1 - i) * decay + rows["key"][i])
            above = above + weight * rows["value"][i]
            below = below + weight
        receptance = 1 / (1 + torch.exp(-rows["receptance"][t]))
        expected.append(w["out.weight"] @ (receptance * above / below))
    y_BTD, _ = module(x[None], None, Pass(torch.arange(LENGTH), 0))
    torch.testing.assert_close(y_BTD[0], torch.stack(expected), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_exponents_that_overflow_are_stabilised() -> None:
    """Keys of several hundred, rising and falling: e^k is no float32, the average of values is."""
    torch.manual_seed(0)
    module = Rwkv4().build(WIDTH, "torch").build()
    exact = Rwkv4().build(WIDTH, "torch").build().double()
    module.key.weight *= 2000
    exact.load_state_dict({name: weight.double() for name, weight in module.state_dict().items()})
    x = torch.randn(1, 200, WIDTH)
    at = Pass(torch.arange(200), 0)
    found, _ = module(x, None, at)
    expected, _ = exact(x.double(), None, at)
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() < 1e-2 * expected.abs().max()
