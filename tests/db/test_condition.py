"""A condition selects what it says, and nothing that is written in one does anything else."""

from __future__ import annotations

import contextlib
import hashlib
import operator
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine
from sqlalchemy.dialects import postgresql

from mixforge.db.condition import COLUMNS, QueryError, read_condition
from mixforge.db.query import ask
from mixforge.db.store import Store

ROWS = [
    # number, bits per byte, decode ms, mixers
    (0, 2.5, 0.5, ("attn", "swiglu")),
    (1, 2.0, 1.5, ("gdn", "swiglu")),
    (2, 1.8, 1.0, ("attn", "gdn", "swiglu")),
    (3, None, None, ("rglru",)),
    (4, 2.0, 0.75, ("mlp", "static")),
]


@pytest.fixture(scope="module")
def stored(tmp_path_factory, empty_file, samples):
    path = tmp_path_factory.mktemp("condition") / "stored.db"
    path.write_bytes(empty_file.read_bytes())
    with Store.open(path) as store:
        campaign = store.add_campaign("laptop", "d", "", 1)
        for number, score, decode_ms, mixers in ROWS:
            proposal = samples.proposal(number, architecture=samples.architecture(number, mixers))
            trial = store.propose(campaign, proposal)
            if score is not None:
                store.record_evaluation(
                    store.claim(trial, "train", "w"), samples.evaluation(score), seconds=1.0
                )
                profile = samples.profile(decode_ms - 0.1)
                store.record_profile(store.claim(trial, "profile", "w"), profile, seconds=1.0)
        yield store


def numbers(store, where):
    return [row[0] for row in ask(store, where=where, columns=("number",)).rows]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("bits_per_byte < 2.1", [1, 2, 4]),
        ("bits_per_byte = 2", [1, 4]),
        ("bits_per_byte == 2.0 and decode_ms < 1", [4]),
        ("1.8 <= bits_per_byte < 2.5", [1, 2, 4]),
        ("2.1 > bits_per_byte", [1, 2, 4]),
        ("gdn in mixers", [1, 2]),
        ("'gdn' in mixers and not attn in mixers", [1]),
        ("'gdn' not in mixers", [0, 3, 4]),
        ("'g' in mixers or '%' in mixers or 'gd_' in mixers", []),
        ("outcome = ok", [0, 1, 2, 4]),
        ("outcome is none", [3]),
        ("outcome IS NOT NULL AND NOT (number IN (0, 1))", [2, 4]),
        ("state = proposed", [3]),
        ("number in ()", []),
        ("number not in (0, 1, 2)", [3, 4]),
        ("architecture like '%rglru%'", [3]),
        ("architecture not like 'lm(1 %' and number < 3", [0, 2]),
        ("not reused", [0, 1, 2, 3, 4]),
        ("reused is true or reused = true or reused", []),
        ("decode_ms < bits_per_byte", [0, 1, 2, 4]),
        ("number != -1 and number < 1e0", [0]),
        ("finished_at > '2020-01-01'", [0, 1, 2, 4]),
        ("finished_at < '2020-01-01 12:30'", []),
        ("not not number = 3", [3]),
        ("(((number = 3)))", [3]),
        ("", [0, 1, 2, 3, 4]),
        ("campaign = laptop and width >= 48", [2, 3, 4]),
        ('campaign = "it\'s"', []),
    ],
)
def test_condition_selects(stored, where, expected):
    assert numbers(stored, where) == expected


def test_digest_may_be_shortened(stored, samples):
    digest = samples.architecture(1, ("gdn", "swiglu")).digest
    assert numbers(stored, f"digest = '{digest}'") == [1]
    assert numbers(stored, f"digest = '{digest[:6]}'") == [1]
    assert numbers(stored, f"digest != '{digest[:6]}'") == [0, 2, 3, 4]
    assert numbers(stored, "digest = '%'") == []


@pytest.mark.parametrize(
    ("where", "message", "column"),
    [
        ("bits_per_bite < 2", "no column 'bits_per_bite'; did you mean bits_per_byte", 1),
        ("decode_ms < prefil_ms", "number cannot be compared with a text; did you mean prefill_ms", 13),
        ("width < 'x'", "number cannot be compared with a text", 9),
        ("reused = 1", "cannot be compared", 10),
        ("outcome =", "expected a column or a value", 10),
        ("outcome = ok and", "expected a column or a value", 17),
        ("(width < 3", r"expected `\)`", 11),
        ("width < 3)", "expected `and`, `or` or the end", 10),
        ("width", "expected a comparison", 6),
        ("width in 3", r"expected `\(`", 10),
        ("width in (1 2)", "expected `,`", 13),
        ("width is 3", "expected `none`", 10),
        ("width like 'x'", "expected texts", 1),
        ("width not < 3", "expected `in` or `like`", 11),
        ("finished_at > yesterday", "expected a time", 15),
        ("width < 3; drop table trial", "cannot be read", 10),
        ("width < 1e999", "number that fits", 9),
        ("width < 3 -- and", "cannot be read", 11),
        ("__import__('os')", "no column '__import__'", 1),
        ("(" * 60 + "width < 1", "levels of nesting", 51),
        ("not " * 60 + "reused", "levels of nesting", 201),
    ],
)
def test_error_shows_the_place(where, message, column):
    with pytest.raises(QueryError, match=message) as raised:
        read_condition(where)
    assert f"^ column {column}" in str(raised.value)


def test_long_condition_is_refused():
    with pytest.raises(QueryError, match="at most 4096"):
        read_condition("width < 1 or " * 1000)
    with pytest.raises(QueryError, match="expected") as raised:
        read_condition("width < 1 or " * 300)
    assert max(map(len, str(raised.value).splitlines())) < 130


# The same condition as text and as a function of a row; None is SQL's unknown.
FIELDS = {"number": 0, "bits_per_byte": 1, "decode_ms": 2}
SIGNS = {"<": operator.lt, "<=": operator.le, "=": operator.eq, "!=": operator.ne, ">": operator.gt}


def compared(sign, field, number):
    def holds(row):
        value = row[FIELDS[field]]
        return None if value is None else SIGNS[sign](value, number)

    return f"{field} {sign} {number}", holds


def negated(inner):
    def holds(row):
        value = inner[1](row)
        return None if value is None else not value

    return f"not ({inner[0]})", holds


def joined(word, left, right):
    def holds(row):
        values = [left[1](row), right[1](row)]
        decisive = word == "or"
        if decisive in values:
            return decisive
        return None if None in values else not decisive

    return f"({left[0]}) {word} ({right[0]})", holds


leaves = st.builds(
    compared,
    st.sampled_from(sorted(SIGNS)),
    st.sampled_from(sorted(FIELDS)),
    st.sampled_from([0, 1, 2, 0.75, 1.8]),
)
conditions = st.recursive(
    leaves,
    lambda inner: st.builds(negated, inner) | st.builds(joined, st.sampled_from(["and", "or"]), inner, inner),
    max_leaves=8,
)


@given(conditions)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_condition_means_what_python_would(stored, condition):
    text, holds = condition
    assert numbers(stored, text) == [row[0] for row in ROWS if holds(row) is True]


def test_condition_can_be_asked_of_postgresql():
    condition = read_condition("gdn in mixers and architecture like 'lm%' and not reused and width in (1, 2)")
    assert "LIKE" in str(condition.compile(dialect=postgresql.dialect()))


HOSTILE = [
    "1; DROP TABLE trial",
    "number = 1 UNION SELECT * FROM campaign",
    "campaign = '' OR '1'='1'",
    "campaign = 'x'); DELETE FROM trial; --",
    "number = (SELECT 1)",
    "load_extension('x')",
    "number = 1 /* */",
    "campaign = char(0)",
    "\0",
    "number = \u0661",
    "\u202ecampaign = 'x'",
    "number = 9" + "9" * 4000,
    "'" * 4000,
]
SIGNS_AND_VALUES = ["(", ")", ",", "<", "=", "'x'", "1", "-1e9", "%", "\\"]
WORDS = ["and", "or", "not", "in", "like", "is", "none"]
alphabet = st.sampled_from([*COLUMNS, *WORDS, *SIGNS_AND_VALUES])


def digest_of(store):
    with store.database.read() as connection:
        dump = "\n".join(connection.connection.driver_connection.iterdump())
    return hashlib.sha256(dump.encode()).hexdigest()


def test_hostile_texts_change_nothing(stored):
    before = digest_of(stored)
    for text in HOSTILE:
        started = time.process_time()
        with contextlib.suppress(QueryError):
            ask(stored, where=text)
        assert time.process_time() - started < 0.05, text
    assert digest_of(stored) == before


@given(st.lists(alphabet, max_size=30).map(" ".join) | st.text(max_size=40))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_text_is_read_or_refused(stored, text):
    with contextlib.suppress(QueryError):
        ask(stored, where=text)


def test_read_condition_needs_no_database():
    assert create_engine("sqlite://") is not None
    assert str(read_condition("width < 3")) == "trials.width < :param_1"
