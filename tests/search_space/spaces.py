"""Spaces that the tests of the grammar's operators share: every form of a right-hand side is in one of them."""

from __future__ import annotations

from mixforge.search_space.grammar import Space

SPACES: dict[str, Space] = {
    name: Space.from_table(table)
    for name, table in {
        "one line": {"start": "lm(4 ** any(attn, swiglu, rglru), width=64)"},
        "copies": {
            "start": "lm(stack, width=any(64, 96), norm=any(rms, layer))",
            "rules": {
                "stack": "any(1, 2, 4) ** group",
                "group": "any(1, 2) * (token + any(mlp, swiglu))",
                "token": "any(linear(rule=any(add, delta), decay=any(none, scalar)), conv, attn(kv=any(mha, mqa)))",
            },
        },
        "recursion": {
            "start": "lm(stack, width=64)",
            "rules": {
                "stack": "any(layer, layer + stack)",
                "layer": "any(attn(window=any(none, 16)), conv, mlp)",
            },
            "recursion": 8,
        },
        "branches": {
            "start": "lm(tree, width=64)",
            "rules": {"tree": "any({leaf: 3, tree + tree: 1, 2 @ tree: 1})", "leaf": "any(attn, conv, mlp)"},
            "recursion": 4,
        },
        "turns in copies": {
            "start": "lm(any(1, 2) ** part, width=64)",
            "rules": {
                "part": "any({gdn: 2, any(1, 2) ** inner: 1})",
                "inner": "any({attn + part: 1, conv: 2})",
            },
            "recursion": 3,
        },
        "same places": {
            "start": "lm(any(a + a, a + b + a, any(b, 2 * b)), width=any(32, 64))",
            "rules": {
                "a": "any(attn, conv)",
                "b": "attn(window=any(none, any(16, 32)), kv=kinds)",
                "kinds": "any(mha, mqa)",
            },
        },
    }.items()
}
