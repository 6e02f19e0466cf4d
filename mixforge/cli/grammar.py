"""Commands on spaces and their sentences: spaces, lint, mutate, diff, scale."""

from __future__ import annotations

from dataclasses import asdict
from fractions import Fraction
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mixforge.cli.output import (
    DEFAULT_DATABASE,
    Database,
    Json,
    RunFailed,
    figure_text,
    narrate,
    print_json,
    show_table,
    table,
)
from mixforge.search_space.count import counted

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mixforge.search_space.architecture import Architecture
    from mixforge.search_space.derivation import Derivation
    from mixforge.search_space.grammar import Space
    from mixforge.search_space.linter import Finding
    from mixforge.search_space.mutation import Variation

Operator = Literal["regrow", "swap", "insert", "delete", "gene"]
Growth = Literal["heads", "head_dim"]
Of = Annotated[
    str | None, typer.Option("--space", metavar="FILE|NAME", help="The space that they are sentences of.")
]


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: mixforge spaces composer")(spaces)
    app.command(
        epilog='Example: mixforge lint "lm(4 * (gdn + swiglu), width=128)" --flow\n\nExample: mixforge lint composer'
    )(lint)
    app.command(epilog="Example: mixforge mutate composer -n 5 --operator swap")(mutate)
    app.command(epilog="Example: mixforge diff griffin hybrid_3to1")(diff)
    app.command(epilog="Example: mixforge scale hybrid_3to1 --stack 4 --params 20e6")(scale)


def spaces(
    name: Annotated[str | None, typer.Argument(help="A published space; all if left out.")] = None,
    as_json: Json = False,
) -> None:
    """Published search spaces: what each is, its paper, what is departed from, and its rules."""
    from mixforge.search_space.grammar import Space, spell_size, write_size
    from mixforge.search_space.published import published, published_names

    chosen = [published(each) for each in (published_names() if name is None else [name])]
    counts = {each.name: Space.published(each.name).count() for each in chosen}
    if as_json:
        print_json(
            {each.name: {**asdict(each), "sentences": write_size(counts[each.name])} for each in chosen}
        )
        return
    if name is None:
        made = table("space", "sentences >", "what", "source", title="Published spaces: mixforge spaces NAME")
        for each in chosen:
            made.add_row(each.name, spell_size(counts[each.name]), each.summary, each.paper)
        show_table(made)
        return
    found = chosen[0]
    print(f"{found.name}: {found.summary}\nSource: {found.paper}\nDepartures: {found.departures}\n")
    print(f"start = {found.table['start']}")
    for key in ("rules", "limits"):
        entries = found.table.get(key)
        for word, text in entries.items() if isinstance(entries, dict) else ():
            print(f"{word} = {text}" if key == "rules" else f"{word} {text}")
    size = counts[found.name]
    print(f"\n{counted(size, 'sentence', spell_size(size))}")


def lint(
    which: Annotated[
        str,
        typer.Argument(metavar="EXPR|PRESET|DIGEST|FILE|NAME", help="An architecture, or a search space."),
    ],
    space: Annotated[
        str | None,
        typer.Option("--space", metavar="FILE|NAME", help="Hold an architecture to this space's limits."),
    ] = None,
    context: Annotated[
        int, typer.Option("--context", min=1, max=2**24, help="Tokens that costs are stated at.")
    ] = 2048,
    flow: Annotated[
        bool, typer.Option("--flow", help="Also send a gradient through a small model of an architecture.")
    ] = False,
    draws: Annotated[
        int, typer.Option("--draws", min=1, max=100_000, help="Sentences drawn from a space.")
    ] = 200,
    repairs: Annotated[
        int, typer.Option("--repairs", min=0, max=100_000, help="Refused sentences of a space to repair.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 0,
    db: Database = DEFAULT_DATABASE,
    as_json: Json = False,
) -> None:
    """What can be said of an architecture or a space before a device is touched. Exit status 1 on an error found."""
    import random

    from mixforge.cli.naming import architecture_of, is_space, space_of
    from mixforge.search_space.linter import lint as lint_architecture
    from mixforge.search_space.linter import lint_space, survey

    if is_space(which):
        if space is not None or flow:
            raise ValueError(f"{which} is a space; --space and --flow are for an architecture")
        found = lint_space(survey(space_of(which), random.Random(seed), draws, repairs))
    else:
        limits = () if space is None else space_of(space).limits
        found = lint_architecture(architecture_of(which, db), limits, context, flow=flow)
    if as_json:
        print_json([asdict(each) for each in found])
    else:
        _show_findings(found)
    errors = [each.sentence for each in found if each.severity == "error"]
    if errors:
        raise RunFailed(f"{errors[0]}" + (f", and {len(errors) - 1} more" if len(errors) > 1 else ""))


def _show_findings(found: Iterable[Finding]) -> None:
    made = table("severity", "rule", "finding")
    for each in found:
        made.add_row(each.severity, each.rule, each.sentence)
    show_table(made)


def mutate(
    space: Annotated[
        str, typer.Argument(metavar="FILE|NAME", help="A campaign's TOML file, or a published space.")
    ],
    of: Annotated[
        str | None,
        typer.Option("--of", metavar="EXPR|PRESET|DIGEST", help="The parent; one is drawn if left out."),
    ] = None,
    operator: Annotated[Operator | None, typer.Option("--operator", help="Only this mutation.")] = None,
    neighbours: Annotated[
        bool, typer.Option("--neighbours", help="List what is one choice away, in order, and draw nothing.")
    ] = False,
    number: Annotated[int, typer.Option("-n", "--number", min=1, max=100_000, help="How many at most.")] = 10,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same children.")] = 0,
    db: Database = DEFAULT_DATABASE,
    as_json: Json = False,
) -> None:
    """Children of an architecture within a space: by mutation, or everything one choice away; with what changed."""
    import random

    from mixforge.cli.naming import space_of
    from mixforge.search_space.mutation import mutate as vary
    from mixforge.search_space.neighbours import neighbours as around

    read, rng = space_of(space), random.Random(seed)
    if neighbours and operator is not None:
        raise ValueError(f"--neighbours lists every choice; leave out --operator {operator}")
    parent = read.draw_legal(rng).derivation if of is None else _sentence_of(read, of, space, db)
    if neighbours:
        children = list(islice(around(read, parent), number))
    else:
        children = [vary(read, parent, rng, () if operator is None else (operator,)) for _ in range(number)]
    _tell_children(read, parent, children, as_json)


def _sentence_of(read: Space, text: str, space: str, db: str) -> Derivation:
    from mixforge.cli.naming import architecture_of

    architecture = architecture_of(text, db)
    found = read.contains(architecture)
    if found is None:
        raise ValueError(f"{architecture} is not a sentence of {space}")
    return found


def _tell_children(space: Space, parent: Derivation, children: list[Variation], as_json: bool) -> None:
    from mixforge.search_space.diff import diff as in_words
    from mixforge.search_space.distance import distance
    from mixforge.search_space.grammar import Rejection

    rows = []
    for each in children:
        admitted = space.admit(each.derivation)
        rows.append(
            {
                "operator": each.operator,
                "place": each.place,
                "distance": distance(parent, each.derivation),
                "changes": in_words(parent, each.derivation),
                "refused": admitted.reason if isinstance(admitted, Rejection) else None,
                "architecture": None if isinstance(admitted, Rejection) else str(admitted),
                "digest": None if isinstance(admitted, Rejection) else admitted.digest,
            }
        )
    if as_json:
        print_json({"parent": str(parent.architecture), "children": rows})
        return
    print(parent.architecture)
    made = table("operator", "distance >", "what changed", "architecture")
    for row, each in zip(rows, children, strict=True):
        became = row["architecture"] or f"refused: {row['refused']}"
        changes = "; ".join(in_words(parent, each.derivation))
        made.add_row(each.operator, str(row["distance"]), changes, str(became))
    show_table(made)


def diff(
    first: Annotated[str, typer.Argument(metavar="EXPR|PRESET|DIGEST", help="An architecture.")],
    second: Annotated[str, typer.Argument(metavar="EXPR|PRESET|DIGEST", help="Another one.")],
    space: Of = None,
    db: Database = DEFAULT_DATABASE,
    as_json: Json = False,
) -> None:
    """How the second architecture differs from the first, in words: layer by layer, or choice by choice of a space."""
    from mixforge.cli.naming import architecture_of, space_of
    from mixforge.search_space.diff import architecture_diff
    from mixforge.search_space.diff import diff as in_words
    from mixforge.search_space.distance import distance

    far = None
    if space is None:
        sentences = architecture_diff(architecture_of(first, db), architecture_of(second, db))
    else:
        read = space_of(space)
        before, after = (_sentence_of(read, each, space, db) for each in (first, second))
        sentences, far = in_words(before, after), distance(before, after)
    if as_json:
        print_json({"changes": sentences, "distance": far})
        return
    for sentence in sentences:
        print(sentence)
    narrate("they are equal" if not sentences else counted(len(sentences), "change"))
    if far is not None:
        narrate(f"their distance in {space} is {far}")


def scale(
    which: Annotated[str, typer.Argument(metavar="EXPR|PRESET|DIGEST", help="The architecture to scale.")],
    stack: Annotated[
        str | None,
        typer.Option("--stack", metavar="FACTOR", help="So many copies of the stack: 4, 5.5, 32/6."),
    ] = None,
    stretch: Annotated[
        str | None,
        typer.Option("--stretch", metavar="FACTOR", help="Every run of equal layers so much longer."),
    ] = None,
    params: Annotated[
        float | None,
        typer.Option("--params", help="Then the largest legal width with so many parameters: 100e6."),
    ] = None,
    grow: Annotated[
        Growth,
        typer.Option("--grow", help="What a greater width gives more of: heads, or channels of a head."),
    ] = "heads",
    db: Database = DEFAULT_DATABASE,
    as_json: Json = False,
) -> None:
    """A winner at a larger size: stacked or stretched (Composer's ways), then widened to a budget of parameters."""
    from mixforge.cli.naming import architecture_of
    from mixforge.search_space import enlargement

    if stack is None and stretch is None and params is None:
        raise ValueError(
            "say how: --stack FACTOR or --stretch FACTOR, --params NUMBER, or both of depth and width"
        )
    if stack is not None and stretch is not None:
        raise ValueError("--stack and --stretch are two ways to one depth; give one of them")
    found = architecture_of(which, db)
    before = found
    if stack is not None:
        found = enlargement.stack(found, _factor(stack))
    if stretch is not None:
        found = enlargement.stretch(found, _factor(stretch))
    if params is not None:
        found = enlargement.widen(found, params=params, grow=grow)
    reason = found.why_illegal()
    if reason is not None:
        raise ValueError(f"{found} cannot be built: {reason}")
    if as_json:
        print_json({"before": _size(before), "after": _size(found)})
        return
    print(found)
    for word, each in (("before", before), ("after", found)):
        size = _size(each)
        text = figure_text("params", each.cost(1).params)
        narrate(f"{word}: {counted(each.depth, 'layer')}, width {size['width']}, {text} parameters")


def _factor(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"factor {text!r} is not a number such as 4, 5.5 or 32/6") from None


def _size(architecture: Architecture) -> dict[str, object]:
    return {
        "architecture": str(architecture),
        "digest": architecture.digest,
        "depth": architecture.depth,
        "width": architecture.width,
        "params": architecture.cost(1).params if architecture.why_illegal() is None else None,
    }
