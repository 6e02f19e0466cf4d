"""Whole models under `torch.compile`: one graph each, and a second length that takes no longer than the first."""

from __future__ import annotations

import pytest
import torch
from torch.fx import GraphModule

from mixforge.search_space.notation import parse

# One of each operation.
MIXERS = [
    "gdn",
    "kda",
    "mamba2(heads=4)",
    "mlstm",
    "rwkv7",
    "linear(decay=both)",
    "hla2",
    "linear(rule=slots(4), decay=channel)",
    "gdn(levels=log, heads=2)",
    "attn",
    "attn(window=16)",
    "attn(query=learned, pos=none)",
    "rglru",
    "conv",
    "ssm(state=4, expand=1)",
    "ssm(rule=s4d, gate=glu, state=4)",
    "hgrn",
    "slstm",
    "lstm",
    "rwkv4",
]


# Dynamo makes an instance of every autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_model_is_one_graph_for_each_length(mixer: str) -> None:
    torch._dynamo.reset()
    graphs = []

    def kept(graph: GraphModule, _: object) -> GraphModule:
        graphs.append(graph)
        return graph

    model = parse(f"lm({mixer} + swiglu, width=32)").build("torch")
    compiled = torch.compile(model, fullgraph=True, backend=kept)
    tokens = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    for number, length in enumerate((20, 40), 1):
        torch.testing.assert_close(compiled(tokens[:, :length]), model(tokens[:, :length]))
        assert len(graphs) == number
    torch._dynamo.reset()
