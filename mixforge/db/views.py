"""The SQL views, for people who ask with sqlite3, psql, pandas or Datasette. Queries of ours read them too.

A view is created by a migration; here stand its names and types, and a test compares the two.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Float, Integer, MetaData, String, Table

from mixforge.db.tables import Instant

views = MetaData()

# Every trial with its campaign, its architecture, its figures and its test scores.
trials = Table(
    "trials",
    views,
    Column("id", Integer),
    Column("campaign", String),
    Column("number", Integer),
    Column("digest", String),
    Column("architecture", String),
    Column("width", Integer),
    Column("depth", Integer),
    Column("mixers", String),
    Column("budget", String),
    Column("origin", String),
    Column("operator", String),
    Column("parent", String),
    Column("second_parent", String),
    Column("state", String),
    Column("outcome", String),
    Column("reason", String),
    Column("reused", Boolean),
    Column("bits_per_byte", Float),
    Column("bits_per_byte_test", Float),
    Column("recall", Float),
    Column("recall_test", Float),
    Column("copying", Float),
    Column("copying_test", Float),
    Column("tracking", Float),
    Column("tracking_test", Float),
    Column("selectivity", Float),
    Column("selectivity_test", Float),
    Column("prefill_ms", Float),
    Column("prefill_ms_spread", Float),
    Column("decode_ms", Float),
    Column("decode_ms_spread", Float),
    Column("train_ms", Float),
    Column("train_ms_spread", Float),
    Column("peak_bytes", BigInteger),
    Column("params", BigInteger),
    Column("flops", BigInteger),
    Column("state_bytes", BigInteger),
    Column("decode_bytes", BigInteger),
    Column("train_tokens", BigInteger),
    Column("train_s", Float),
    Column("proposed_at", Instant),
    Column("finished_at", Instant),
)

# How many trials of each campaign share an origin, a state and an outcome.
progress = Table(
    "progress",
    views,
    Column("campaign", String),
    Column("origin", String),
    Column("state", String),
    Column("outcome", String),
    Column("trials", Integer),
    Column("reused", Integer),
)

# Every attempt that did not end well, with its reason.
failures = Table(
    "failures",
    views,
    Column("campaign", String),
    Column("number", Integer),
    Column("digest", String),
    Column("architecture", String),
    Column("stage", String),
    Column("worker", String),
    Column("outcome", String),
    Column("reason", String),
    Column("started_at", Instant),
    Column("ended_at", Instant),
    Column("seconds", Float),
)

# Every profile with the device it was measured on.
profiles = Table(
    "profiles",
    views,
    Column("id", Integer),
    Column("digest", String),
    Column("architecture", String),
    Column("outcome", String),
    Column("device", String),
    Column("batch", BigInteger),
    Column("context", BigInteger),
    Column("dtype", String),
    Column("backend", String),
    Column("prefill_ms", Float),
    Column("prefill_ms_spread", Float),
    Column("decode_ms", Float),
    Column("decode_ms_spread", Float),
    Column("train_ms", Float),
    Column("train_ms_spread", Float),
    Column("peak_bytes", BigInteger),
    Column("recorded_at", Instant),
)
