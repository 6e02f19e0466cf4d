"""Meaning: texts and Python words give architectures; printing and parsing are inverse; errors help."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mixforge.words as words
from mixforge.search_space.architecture import Architecture, Beside, Layer, Reuse
from mixforge.search_space.genes import Call, Choice, Form, GeneValue, Real, Whole, genes_of
from mixforge.search_space.mixer import Mixer
from mixforge.search_space.mixers import CATALOGUE
from mixforge.search_space.mixers.attn import Attn
from mixforge.search_space.notation import _layer, from_json, parse, parse_mixer
from mixforge.search_space.spelling import spell_gene, spell_mixer
from mixforge.search_space.stack import FUSES
from mixforge.search_space.syntax import NotationError, spell_number
from mixforge.search_space.vocabulary import vocabulary

WIDTHS = (64, 96, 128, 192, 256)
OLD_DIGESTS = {
    "lm(6 * (3 * (gdn + swiglu) + attn(window=1024) + swiglu), width=512)": "66631a996662",
    "lm(attn + mlp, width=64, vocab=512, embed=untied, norm=layer, place=sandwich)": "3b92b90f74a7",
    "lm(3 @ (attn + beside(1*attn, 1*mamba2, fuse=mean)), width=128, place=post)": "1725898689c6",
    "lm((attn(heads=5) | 2*gdn) + swiglu, width=64)": "7da9b18f5c61",
}
LONG_FORMS = (
    "reuse({}, times=2, halt=act)",
    "reuse({}, times=1, halt=act, signal=step)",
    "reuse({}, times=3)",
    "segment({}, length=64, memory=4)",
    "segment({}, length=8)",
    "segment({}, length=8, memory=2, carry=associative(8))",
)
RESIDUALS = (
    "residual({})",
    "residual({}, place=inside)",
    "residual({}, place=pre)",
    "residual({}, place=none)",
)
FORMS_OF_BESIDE = (
    *(f"fuse={fuse}" for fuse in FUSES),
    "norm=rms",
    "norm=none",
    "fuse=mean, norm=none",
    "fuse=concat, norm=rms",
)


def gene_values(domain: Whole | Real | Choice | Call) -> st.SearchStrategy[GeneValue]:
    match domain:
        case Whole():
            small = st.sampled_from([1, 2, 3, 4, 8, 16, 32, 64, 128])
            return small.filter(domain.has)
        case Real():
            return st.sampled_from([0.125, 0.5, 1.0, 2.0, 8 / 3, 4.0]).filter(domain.has)
        case Choice():
            return st.sampled_from(domain.names)
        case Call():
            arguments = st.tuples(*(gene_values(each) for each in domain.arguments))
            return arguments.map(lambda given: Form(domain.name, given))  # type: ignore[arg-type]


@st.composite
def mixer_texts(draw: st.DrawFn) -> str:
    """A name of the catalogue or an alias, with a few genes."""
    name = draw(st.sampled_from(sorted(vocabulary())))
    genes = genes_of(vocabulary()[name][0])
    chosen = draw(st.lists(st.sampled_from(sorted(genes)), max_size=2, unique=True)) if genes else []
    said = []
    for gene in chosen:
        values = st.one_of(*map(gene_values, genes[gene].domains))
        said.append(f"{gene}={spell_gene(draw(values))}")
    return f"{name}({', '.join(said)})" if said else name


def stack_texts() -> st.SearchStrategy[str]:
    branch = st.tuples(st.sampled_from(["", "2*", "1*"]), mixer_texts()).map("".join)
    beside = st.lists(branch, min_size=2, max_size=3)
    fused = st.tuples(beside, st.sampled_from(FORMS_OF_BESIDE)).map(
        lambda pair: f"beside({', '.join(pair[0])}, {pair[1]})"
    )
    leaf = st.one_of(mixer_texts(), beside.map(" | ".join).map("({})".format), fused)

    def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        sums = st.lists(inner, min_size=1, max_size=3).map(" + ".join).map("({})".format)
        repeated = st.builds("{} {} {}".format, st.integers(1, 3), st.sampled_from("*@"), sums)
        return st.one_of(sums, repeated, *(sums.map(form.format) for form in LONG_FORMS))

    def surround(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        sums = st.lists(inner, min_size=1, max_size=2).map(" + ".join)
        return st.one_of(sums.map(form.format) for form in RESIDUALS)

    around = st.recursive(leaf, surround, max_leaves=3)
    return st.recursive(st.one_of(leaf, around), grow, max_leaves=5)


texts = st.builds(
    "lm({}, width={}{})".format,
    stack_texts(),
    st.sampled_from(WIDTHS),
    st.sampled_from(
        [
            "",
            ", vocab=512",
            ", vocab=256, embed=untied",
            ", norm=layer, place=post",
            ", place=pre",
            ", eps=1e-5, softcap=30, embed_scale=sqrt",
            ", eps=1e-06, embed_scale=8, place=deep, norm=simple",
        ]
    ),
)


@settings(max_examples=100, deadline=None)
@given(texts)
def test_printing_and_parsing_are_inverse(text: str) -> None:
    architecture = parse(text)
    printed = str(architecture)
    again = parse(printed)
    assert again == architecture
    assert again.digest == architecture.digest
    assert again.stack == architecture.stack
    assert str(again) == printed
    assert from_json(architecture.canonical_json) == architecture


@settings(max_examples=50, deadline=None)
@given(st.lists(stack_texts(), min_size=1, max_size=3), st.integers(1, 3), st.sampled_from(WIDTHS))
def test_regrouping_changes_nothing(parts: list[str], times: int, width: int) -> None:
    whole = " + ".join(f"({part})" for part in parts)
    forms = [
        f"{times} * ({whole})",
        " + ".join([f"({whole})"] * times),
        " + ".join([*([whole] * (times - 1)), *parts]),
        f"1 @ ({times} * (1 * ({whole})))",
        f"({whole})" + f" + {times - 1} * ({whole})" * (times > 1),
    ]
    architectures = [parse(f"lm({form}, width={width})") for form in forms]
    assert len({each.digest for each in architectures}) == 1
    assert len({str(each) for each in architectures}) == 1


@settings(max_examples=50, deadline=None)
@given(mixer_texts(), st.sampled_from(WIDTHS))
def test_defaults_and_aliases_change_nothing(text: str, width: int) -> None:
    mixer = parse_mixer(text)
    genes = genes_of(type(mixer))
    full = ", ".join(f"{name}={spell_gene(getattr(mixer, name))}" for name in genes)
    spelled = f"{mixer.word()}({full})"
    assert parse_mixer(spelled) == mixer
    assert parse(f"lm({text}, width={width})").digest == parse(f"lm({spelled}, width={width})").digest


@settings(max_examples=50, deadline=None)
@given(st.lists(mixer_texts(), min_size=2, max_size=3), st.randoms(use_true_random=False))
def test_the_order_of_branches_changes_nothing(branches: list[str], rng: object) -> None:
    forward = parse(f"lm({' | '.join(branches)}, width=128)")
    backward = parse(f"lm({' | '.join(reversed(branches))}, width=128)")
    assert forward == backward
    assert str(forward) == str(backward)


def test_every_alias_prints_as_itself_and_is_exactly_its_genes() -> None:
    for name, (mixer, genes) in vocabulary().items():
        if genes:
            long = ", ".join(f"{gene}={spell_gene(value)}" for gene, value in genes.items())
            assert parse_mixer(name) == parse_mixer(f"{mixer.word()}({long})") == mixer(**genes)
            printed = str(parse(f"lm({mixer.word()}({long}), width=256)"))
            assert printed == f"lm({name}, width=256)"


@given(mixer_texts())
def test_a_mixer_of_a_text_is_the_one_that_python_makes(text: str) -> None:
    read = parse_mixer(text)
    made = type(read)(**{name: getattr(read, name) for name in genes_of(type(read))})
    assert read == made
    assert read.json == made.json
    assert hash(read) == hash(made)
    assert read.fault is made.fault is None


def test_aliases_take_further_genes_but_none_that_they_set() -> None:
    assert (
        str(parse("lm(linear(rule=delta, decay=scalar, heads=2), width=256)"))
        == "lm(gdn(heads=2), width=256)"
    )
    assert spell_mixer(parse_mixer("glu(act=sigmoid)"), 64) == "glu(act=sigmoid)"
    assert spell_mixer(parse_mixer("swiglu(expand=2)"), 64) == "swiglu(expand=2)"


@pytest.mark.parametrize(
    "text",
    [
        "lm(6 * (3 * (gdn + swiglu) + attn(window=1024) + swiglu), width=512)",
        "lm(4 * (2 * (rglru + geglu) + attn(kv=mqa, window=1024) + geglu), width=512)",
        "lm(6 * (attn(window=9) + swiglu) + attn(kv=own) + swiglu + 5 * (attn(kv=shared) + swiglu), width=512)",
        "lm(12 * ((attn | 2 * mamba2) + swiglu), width=576)",
        "lm(4 * ((1 * attn | 1 * mamba2) + swiglu), width=128)",
        "lm(2 @ (gdn + swiglu) + 3 * (2 @ (attn + swiglu)), width=64, vocab=128, embed=untied, place=post)",
        "lm(beside(attn, gdn, fuse=gate) + swiglu, width=128, norm=layer)",
        "lm(attn | swiglu, width=64)",
        "lm(swiglu + 3 * (attn + swiglu), width=64)",
        "lm(2 * (attn + swiglu) + gdn + swiglu, width=64)",
        "lm(1024 * attn, width=64)",
    ],
)
def test_canonical_texts_stay_as_they_are(text: str) -> None:
    assert str(parse(text)) == text


def test_what_the_operators_mean() -> None:
    attn, glu = Layer(parse_mixer("attn")), Layer(parse_mixer("swiglu"))
    assert parse("lm(2 * (attn + swiglu), width=64)").stack == (attn, glu, attn, glu)
    assert parse("lm(3 @ (2 @ attn), width=64)").stack == (Reuse(6, (attn,)),)
    assert parse("lm(1 @ attn, width=64)").stack == (attn,)
    assert parse("lm(swiglu | attn, width=64)").stack == (Beside((attn.mixer, glu.mixer)),)
    assert parse("lm(attn | attn | swiglu, width=64)").stack == (Beside((attn.mixer, attn.mixer, glu.mixer)),)


def test_a_factor_inside_a_bar_is_a_share_of_the_heads() -> None:
    whole, window = Attn(), Attn(window=8)
    shared = parse("lm(2*attn | attn(window=8), width=192)").stack
    narrowed = (window.narrow(192, Fraction(1, 3)), whole.narrow(192, Fraction(2, 3)))
    assert isinstance(shared[0], Beside)
    assert set(shared[0].branches) == set(narrowed)
    assert parse("lm(4*attn | 2*attn(window=8), width=192)").stack == shared
    # The long way to say the same model is the same architecture, and prints the short way.
    long = " | ".join(spell_mixer(mixer, 192) for mixer in narrowed)
    assert parse(f"lm({long}, width=192)").stack == shared
    assert str(parse(f"lm({long}, width=192)")) == "lm(attn(window=8) | 2 * attn, width=192)"


def test_shares_that_do_not_divide_are_kept_and_illegal() -> None:
    architecture = parse("lm(12 * ((2*mamba2 | attn(kv=gqa(4))) + swiglu), width=512)")
    found = architecture.illegality()
    assert found is not None
    assert found.fault == "shares"
    assert "8 heads" in found.sentence
    assert parse(str(architecture)) == architecture


def test_a_cache_that_no_layer_reads_is_an_ordinary_one() -> None:
    assert parse("lm(attn(kv=own) + swiglu, width=64)") == parse("lm(attn + swiglu, width=64)")
    read = parse("lm(attn(kv=own) + attn(kv=own) + attn(kv=shared), width=64)")
    assert str(read) == "lm(attn + attn(kv=own) + attn(kv=shared), width=64)"
    looped = parse("lm(attn(kv=own) + 2 @ (attn(kv=shared) + attn(kv=own)), width=64)")
    assert str(looped) == "lm(attn(kv=own) + 2 @ (attn(kv=shared) + attn(kv=own)), width=64)"


@pytest.mark.parametrize(
    ("text", "column", "saying"),
    [
        ("attn", 0, "lm(stack"),
        ("lm(6 * (gdm + swiglu), width=64)", 8, "did you mean 'gdn'"),
        ("lm(attn(windw=64), width=64)", 8, "did you mean 'window'"),
        ("lm(attn(window=big), width=64)", 15, "none or a whole number from 2"),
        ("lm(attn(pos=rop), width=64)", 12, "did you mean 'rope'"),
        ("lm(attn(kv=gqa(0)), width=64)", 11, "gqa(a whole number"),
        ("lm(attn(64), width=64)", 8, "by name"),
        ("lm(attn, widht=64)", 9, "did you mean 'width'"),
        ("lm(attn)", 0, "needs a width"),
        ("lm(attn, width=0)", 15, "whole number from 1"),
        ("lm(attn, width=64, norm=rmz)", 24, "did you mean 'rms'"),
        ("lm(attn, swiglu, width=64)", 0, "one stack"),
        ("lm(0 * attn, width=64)", 3, "from 1 to 1024"),
        ("lm(attn * 3, width=64)", 3, "stands first"),
        ("lm(2.5 * attn, width=64)", 3, "not a whole number"),
        ("lm(3 ** attn, width=64)", 3, "search space"),
        ("lm(any(attn, gdn), width=64)", 3, "'any' has no place"),
        ("lm(999 * (999 * attn), width=64)", 3, "at most 1024"),
        ("lm(attn + 999 @ (2 * attn), width=64)", 10, "at most 1024"),
        ("lm(attn | (gdn + swiglu), width=64)", 11, "one mixer"),
        ("lm(beside(attn), width=64)", 3, "there are 2 to 16"),
        ("lm(beside(attn, gdn, fuze=sum), width=64)", 21, "did you mean 'fuse'"),
        ("lm(beside(attn, gdn, fuse=scaler), width=64)", 26, "did you mean 'scalar'"),
        ("lm(beside(attn, gdn, norm=layer), width=64)", 26, "expected none, rms"),
        ("lm(attn, width=64, place=gatd)", 25, "did you mean 'gated'"),
        ("lm(attn, width=64, softcap=-1)", 27, "none or a number from 0.1"),
        ("lm(attn, width=64, eps=big)", 23, "a number from 1e-12 to 0.1 or auto"),
        ("lm(attn + 3, width=64)", 10, "before * or @"),
        ("lm(reuse(attn), width=64)", 3, "takes one stack and times="),
        ("lm(reuse(attn, times=0), width=64)", 21, "whole number from 1"),
        ("lm(reuse(attn, times=2, halt=axt), width=64)", 29, "did you mean 'act'"),
        ("lm(attn + reuse(attn + mlp, times=1000), width=64)", 10, "at most 1024"),
        ("lm(segment(attn, lenght=8), width=64)", 17, "did you mean 'length'"),
        ("lm(segment(attn, gdn, length=8), width=64)", 3, "takes one stack and length="),
        ("lm(segment(attn, length=8, carry=asociative(4)), width=64)", 33, "tokens or associative("),
        ("lm(segmant(attn, length=8), width=64)", 3, "did you mean 'segment'"),
        ("lm(attn | segment(attn, length=8), width=64)", 10, "one mixer"),
        ("lm(residual(attn, mlp), width=64)", 3, "takes one stack and place="),
        ("lm(residual(attn, place=insid), width=64)", 24, "did you mean 'inside'"),
        ("lm(gdn + residual(mlp + 2 @ attn), width=64)", 9, "put n @ and segment around it"),
        ("lm(lm(attn, width=64), width=64)", 3, "'lm' has no place"),
        ("lm(__import__(os), width=64)", 3, "unknown mixer"),
        ("lm(attn(heads=2, heads=3), width=64)", 17, "given twice"),
        ("lm(conv(), width=64, width=64)", 21, "given twice"),
    ],
)
def test_errors_name_the_place_and_the_way_out(text: str, column: int, saying: str) -> None:
    with pytest.raises(NotationError) as caught:
        parse(text)
    assert saying in str(caught.value)
    assert caught.value.column == column
    assert str(caught.value).split("\n")[2] == " " * (4 + column) + "^"


@pytest.mark.parametrize(
    ("said", "canonical"),
    [
        (
            "lm(beside(attn, gdn, fuse=mean, norm=rms), width=64)",
            "lm(beside(attn, gdn, fuse=mean), width=64)",
        ),
        ("lm(beside(attn, gdn, norm=none), width=64)", "lm(attn | gdn, width=64)"),
        ("lm(reuse(reuse(attn, times=2), times=3, halt=none), width=64)", "lm(6 @ attn, width=64)"),
        ("lm(reuse(attn, times=1, halt=act), width=64)", "lm(attn, width=64)"),
        ("lm(attn + segment(2 * mlp, length=8), width=64)", "lm(attn + 2 * mlp, width=64)"),
        ("lm(segment(attn, length=8), width=64)", "lm(segment(attn, length=8, memory=16), width=64)"),
        (
            "lm(2 @ reuse(attn, times=2, signal=step), width=64)",
            "lm(2 @ reuse(attn, times=2, signal=step), width=64)",
        ),
        (
            "lm(residual(attn) + residual(mlp | attn, place=pre), width=64)",
            "lm(attn + (attn | mlp), width=64)",
        ),
        ("lm(residual(attn, place=inside), width=64, place=inside)", "lm(attn, width=64, place=inside)"),
        (
            "lm(residual(residual(attn, place=post) + 2 * mlp), width=64, place=post)",
            "lm(residual(residual(attn) + 2 * mlp), width=64, place=post)",
        ),
        ("lm(residual(residual(attn), place=sandwich), width=64)", "lm(residual(residual(attn)), width=64)"),
        (
            "lm(residual(residual(attn, place=post), place=inside), width=64, place=post)",
            "lm(residual(residual(attn), place=none), width=64, place=post)",
        ),
        (
            "lm(residual(attn(reads=embeddings), place=none), width=64)",
            "lm(attn(reads=embeddings), width=64)",
        ),
        (
            "lm(mlp + residual(attn(reads=embeddings), place=sandwich), width=64)",
            "lm(mlp + residual(attn(reads=embeddings), place=inside), width=64)",
        ),
        ("lm(attn, width=64, eps=0.000001)", "lm(attn, width=64)"),
        ("lm(attn, width=64, eps=auto, scale=standard, weights=plain)", "lm(attn, width=64)"),
        ("lm(attn, width=64, norm=layer, eps=1e-6)", "lm(attn, width=64, norm=layer, eps=1e-06)"),
        ("lm(attn, width=64, embed_scale=8, softcap=none)", "lm(attn, width=64, embed_scale=sqrt)"),
        ("lm(attn, width=64, embed_scale=1.0)", "lm(attn, width=64)"),
    ],
)
def test_words_that_say_what_holds_without_them_are_dropped(said: str, canonical: str) -> None:
    assert str(parse(said)) == canonical
    assert parse(said).digest == parse(canonical).digest


@pytest.mark.parametrize(
    ("first", "second", "width"),
    [
        ("mlp(expand=0.125)", "mlp(expand=0.13)", 65),
        ("swiglu(expand=0.125)", "swiglu(expand=0.127)", 65),
        ("moe(expand=0.1)", "moe(expand=0.094)", 64),
        ("ttm(expand=0.15, heads=1)", "ttm(expand=0.14, heads=1)", 9),
        ("avey(context=0.51)", "avey", 24),
        ("avey(context=0.13, expand=1)", "avey(context=0.14, expand=1)", 24),
        ("moe(top_k=4, experts=4, balance=bias)", "moe(top_k=4, experts=4)", 64),
        ("moe(balance=bias(1.0))", "moe(balance=bias(1))", 64),
        ("attn(heads=1, qk_norm=rms_all)", "attn(heads=1, qk_norm=rms)", 24),
        ("linear(heads=1, out_norm=gated, out_gate=none)", "linear(heads=1, out_gate=none)", 24),
    ],
)
def test_genes_that_mean_one_model_have_one_digest(first: str, second: str, width: int) -> None:
    both = [parse(f"lm({text} + conv, width={width})") for text in (first, second)]
    assert both[0] == both[1]
    assert both[0].digest == parse(str(both[0])).digest
    assert both[0].why_illegal() is None


def test_a_segment_of_channel_mixers_is_one_where_a_matrix_carries() -> None:
    plain = parse("lm(segment(swiglu, length=8) + attn, width=16)")
    assert plain == parse("lm(swiglu + attn, width=16)")
    carried = parse("lm(segment(swiglu, length=8, carry=associative(4)) + attn, width=16)")
    assert carried != plain
    model = carried.build()
    assert sum(weight.numel() for weight in model.parameters()) == carried.cost(20).params


def test_digests_of_old_texts_stay() -> None:
    """Of architectures in people's databases: new words and forms leave them as they are."""
    assert {text: parse(text).digest[:12] for text in OLD_DIGESTS} == OLD_DIGESTS


def test_python_words_are_the_text() -> None:
    attn, gdn, swiglu, gqa, lm = words.attn, words.gdn, words.swiglu, words.gqa, words.lm
    made = lm(6 * (3 * (gdn + swiglu) + attn(window=1024, kv=gqa(4)) + swiglu), width=512, embed=words.untied)
    assert made == parse(
        "lm(6 * (3 * (gdn + swiglu) + attn(window=1024, kv=gqa(4)) + swiglu), width=512, embed=untied)"
    )
    assert lm(words.beside(attn, gdn, fuse=words.scalar, norm=words.rms), width=64, softcap=30) == parse(
        "lm(beside(attn, gdn, fuse=scalar, norm=rms), width=64, softcap=30)"
    )
    branches = words.beside(2 * gdn, attn, fuse=sum)
    assert lm(2 @ branches, width=192) == parse("lm(2 @ (2*gdn | attn), width=192)")
    namespace: dict[str, object] = {}
    exec("from mixforge.words import *", namespace)
    assert namespace["gdn"] == gdn
    assert "sum" not in namespace
    with pytest.raises(AttributeError, match="did you mean 'swiglu'"):
        words.swigle  # noqa: B018


def test_python_trees_without_a_text_raise_plain_sentences() -> None:
    deep = words.attn
    for _ in range(3000):
        deep = 1 * deep
    with pytest.raises(NotationError, match="nested too deeply"):
        words.lm(deep, width=64)
    with pytest.raises(NotationError, match=r"^attn has no gene 'x'"):
        words.lm(words.attn(x=1), width=64)


@pytest.mark.parametrize(
    "text", ["{}", "[]", "x", '{"units":[["attn"]],"width":64}', '{"units":[],"width":64}']
)
def test_broken_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        from_json(text)


def test_the_catalogue_says_what_the_notation_needs() -> None:
    for name, mixer in CATALOGUE.items():
        assert mixer.word() == name
        assert issubclass(mixer, Mixer)
        for gene in genes_of(mixer).values():
            assert gene.domains
            assert gene.default is None or any(domain.has(gene.default) for domain in gene.domains)


def test_parsing_48_layers_is_quick() -> None:
    text = "lm(" + " + ".join(["attn(window=1024) + swiglu"] * 24) + ", width=512)"
    times = []
    for _ in range(30):
        started = time.thread_time()
        architecture = parse(text)
        assert architecture.why_illegal() is None
        assert architecture.digest
        times.append(time.thread_time() - started)
    # About 1 ms on one core; the bound leaves room for a busy machine.
    assert min(times) < 0.008


def test_architectures_are_values() -> None:
    first, second = parse("lm(2 * attn, width=64)"), parse("lm(attn + attn, width=64)")
    assert {first} == {second}
    assert isinstance(first, Architecture)
    assert first != parse("lm(2 * attn, width=128)")


@pytest.mark.parametrize(
    "theta",
    ["1e9", "15e10", "1e12", "123456789", "999999999", "500000", "1.2345678901e10", "1.2345678905e9"],
)
def test_large_numbers_are_written_as_they_are_read(theta: str) -> None:
    read = parse(f"lm(attn(theta={theta}), width=64)")
    assert str(read) == f"lm(attn(theta={theta}), width=64)"
    assert parse(str(read)).digest == read.digest
    assert from_json(read.canonical_json) == read


@given(st.floats(0, 12).map(lambda power: 10**power), st.floats(1e-12, 0.1), st.floats(0.1, 1e4))
def test_numbers_are_read_as_they_are_written(theta: float, eps: float, softcap: float) -> None:
    made = words.lm(words.attn(theta=theta), width=64, eps=eps, softcap=softcap)
    for again in (parse(str(made)), from_json(made.canonical_json)):
        assert again == made
        assert str(again) == str(made)
        assert again.digest == made.digest
        # That of the default is not written.
        assert (1e-6 if again.eps is None else again.eps, again.softcap) == (eps, softcap)
    assert parse_mixer(f"attn(theta={spell_number(theta)})") == Attn(theta=theta)


@pytest.mark.parametrize(
    ("said", "whole"),
    [
        ("attn(window=48.0)", "attn(window=48)"),
        ("attn(kv=gqa(2.0))", "attn(kv=gqa(2))"),
        ("attn(kv=filters(8.))", "attn(kv=filters(8))"),
        ("attn(window=.3e2)", "attn(window=30)"),
    ],
)
def test_a_whole_number_with_a_point_is_a_whole_number(said: str, whole: str) -> None:
    """In every process: what is remembered of a layer is found under each tree that equals its own."""
    assert repr(parse_mixer(said)) == repr(parse_mixer(whole))
    texts = [f"lm({mixer}, width=64)" for mixer in (said, whole)]
    for order in (texts, texts[::-1]):
        _layer.cache_clear()
        assert len({parse(text) for text in order}) == 1


def test_whole_numbers_with_a_point_stand_wherever_whole_numbers_do() -> None:
    assert parse("lm(2.0 * attn, width=64.0)") == parse("lm(2 * attn, width=64)")
    assert words.lm(words.attn(window=48.0), width=64) == parse("lm(attn(window=48), width=64)")
    with pytest.raises(NotationError, match=r"^window=48\.5 is not legal for attn; expected .* whole number"):
        parse("lm(attn(window=48.5), width=64)")
    with pytest.raises(NotationError, match=r"^window=1e10 is not legal for attn"):
        parse("lm(attn(window=1e10), width=64)")


@pytest.mark.parametrize(
    ("sparse", "message"),
    [
        ("nsa(8, 2)", r"expected nsa\(a whole number from 2 to 65536, .*1048576\)\s"),
        ("block_topq(8, 2)", "did you mean 'block_topk'"),
        ("strided", r"expected strided\(a whole number from 2 to 65536\)\s"),
    ],
)
def test_a_form_with_other_arguments_is_told_what_it_takes(sparse: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(f"lm(attn(sparse={sparse}), width=64)")
