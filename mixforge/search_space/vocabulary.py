"""The names of mixers and of their genes' values: what `attn(window=64)` or `gdn` means."""

from __future__ import annotations

from functools import lru_cache

from mixforge.search_space.genes import Call, Choice, Domain, Form, Gene, GeneValue, Real, genes_of
from mixforge.search_space.mixer import Mixer
from mixforge.search_space.mixers import CATALOGUE
from mixforge.search_space.stack import FORMS
from mixforge.search_space.syntax import Apply, Expression, Name, NotationError, Number, nearest, understand


@lru_cache(maxsize=1)
def vocabulary() -> dict[str, tuple[type[Mixer], dict[str, GeneValue]]]:
    """Every name of a mixer, aliases included: what class it is and which genes the name sets."""
    words: dict[str, tuple[type[Mixer], dict[str, GeneValue]]] = {
        name: (each, {}) for name, each in CATALOGUE.items()
    }
    for name, mixer in CATALOGUE.items():
        for alias, genes in mixer.aliases.items():
            if alias in words:
                raise TypeError(f"{name} calls one of its points {alias}, which is another mixer's name")
            words[alias] = mixer, dict(genes)
    return words


def mixer_named(word: str) -> str:
    """The catalogue's name of a mixer or of an alias. Raises ValueError with the nearest name."""
    if word not in vocabulary():
        raise ValueError(f"unknown mixer '{word}'{_nearest_mixer(word)}")
    return vocabulary()[word][0].word()


def parse_mixer(text: str) -> Mixer:
    """The mixer that an expression such as `attn(window=64)` means. Raises NotationError."""
    return understand(text, interpret_mixer)


def interpret_mixer(tree: Expression) -> Mixer:
    """The mixer that a name or a call means. Raises NotationError."""
    match tree:
        case Apply():
            word = tree.function
        case Name():
            word = tree.id
        case Number():
            raise NotationError("a number stands before * or @, as in 3 * attn", tree.column)
        case _:
            raise NotationError("expected one mixer, such as attn(window=64)", tree.column)
    known = vocabulary()
    if word not in known:
        raise NotationError(f"unknown mixer '{word}'{_nearest_mixer(word)}", tree.column)
    mixer, genes = known[word]
    return mixer.of({**genes, **_genes(tree, mixer)} if isinstance(tree, Apply) else genes)


def _nearest_mixer(word: str) -> str:
    if word in ("any", "lm"):
        return f"; '{word}' has no place inside an architecture's stack"
    return nearest(word, [*vocabulary(), *FORMS]) or f"; known: {', '.join(sorted(vocabulary()))}"


def _genes(tree: Apply, mixer: type[Mixer]) -> dict[str, GeneValue]:
    genes, word = genes_of(mixer), tree.function
    if tree.arguments:
        known = ", ".join(genes) or "none"
        raise NotationError(f"{word} takes its genes by name; its genes: {known}", tree.arguments[0].column)
    found: dict[str, GeneValue] = {}
    for name, value in tree.keywords:
        if name not in genes:
            hint, known = nearest(name, genes), ", ".join(genes) or "none"
            raise NotationError(
                f"{word} has no gene '{name}'{hint}; its genes: {known}", tree.keyword_column(name)
            )
        if name in found:
            raise NotationError(f"the gene '{name}' is given twice", tree.keyword_column(name))
        found[name] = gene_value(word, genes[name], value)
    return found


def gene_value(word: str, gene: Gene, tree: Expression) -> GeneValue:
    """The value of one gene. Raises NotationError where it is not a legal one."""
    if isinstance(tree, Name) and tree.id in gene.words:
        return tree.id
    value = _plain_value(tree)
    if value is None and gene.default is None:
        return None
    for domain in gene.domains:
        if domain.has(value):
            # 1 and 1.0 are one value; which of the two a gene holds follows from its domain.
            return float(value) if isinstance(value, int) and isinstance(domain, Real) else value
    names = [name for domain in gene.domains for name in _names(domain)]
    said = tree.function if isinstance(tree, Apply) else tree.id if isinstance(tree, Name) else None
    # A form that is there, with other arguments than it takes, is told of itself alone.
    form = next((each for each in gene.domains if isinstance(each, Call) and each.name == said), None)
    hint = nearest(said, names) if form is None and said is not None else ""
    raise NotationError(
        f"{gene.name}={tree} is not legal for {word}{hint}; expected {gene if form is None else form}",
        tree.column,
    )


def _plain_value(tree: Expression) -> GeneValue:
    match tree:
        case Number():
            return tree.value
        case Name():
            return None if tree.id == "auto" else tree.id
        case Apply() if not tree.keywords:
            numbers = tuple([each.value for each in tree.arguments if isinstance(each, Number)])
            if len(numbers) == len(tree.arguments):
                return Form(tree.function, numbers)
    raise NotationError(
        "a gene's value is a number, a name or a name with numbers, as in gqa(4)", tree.column
    )


def _names(domain: Domain) -> tuple[str, ...]:
    match domain:
        case Choice():
            return domain.names
        case Call():
            return (domain.name,)
    return ()
