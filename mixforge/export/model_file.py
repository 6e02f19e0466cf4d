"""The text of an exported model.py: what it is, its definitions, what builds it, what loads and runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mixforge.export import standalone
from mixforge.export.call import callables, write
from mixforge.export.definitions import Key
from mixforge.export.source import Section, collect
from mixforge.search_space.part import Part

_DOCSTRING = '''"""A sequence model that architecture search found, in one file.

    {text}

Digest {digest}; {params:,} parameters; tokens are bytes.
It runs wherever torch and safetensors are installed:

    python model.py --prompt "def " --tokens 200 --temperature 0.8 --seed 0

    from model import generate, load

    model = load("the/folder")                                    # weights are checked by their sha256
    logits_BTX = model(tokens_BT)                                 # one pass; tokens are int64
    logits_BX, state = model.prefill(tokens_BT, capacity=2048)    # read a prompt, with room for 2,048 tokens
    logits_BX, state = model.step(token_B, state)                 # one token more
    text = b"".join(generate(model, "def ", tokens=200))

A tensor's name ends in its shape: B batch, T time, D width, H heads, K key dim, V value dim, N state dim,
C chunks, L chunk length, W window, F feed-forward width, X vocabulary.
"""
'''


def write_model_file(part: Part, *, text: str, digest: str, params: int) -> str:
    """Python source whose `build()` makes `part`, with `load`, `generate` and a command line.

    `text` is the architecture's canonical text. Raises ValueError, naming the definition, where something
    that the part reaches cannot stand in a file of its own.
    """
    given = Key(standalone.__name__, "build")
    roots: list[Callable[..., Any]] = [standalone.load, standalone.generate, standalone.main]
    source = collect([*callables(part), *roots], given={given})
    building = write(part, source.name, taken=source.taken)
    ending = [section for section in source.sections if section.module == standalone.__name__]
    models = [_headed(section) for section in source.sections if section.module != standalone.__name__]
    return "\n\n\n".join(
        [
            _DOCSTRING.format(text=text, digest=digest, params=params)
            + f"\nfrom __future__ import annotations\n\n{source.imports}",
            *models,
            building,
            *(section.text for section in ending),
            'if __name__ == "__main__":\n    main()\n',
        ]
    )


def _headed(section: Section) -> str:
    """A module's definitions under its docstring, which has the equations and their source, as a comment."""
    lines = [f"# {line}".rstrip() for line in section.docstring.splitlines()]
    return "\n".join(lines) + "\n\n\n" + section.text if lines else section.text
