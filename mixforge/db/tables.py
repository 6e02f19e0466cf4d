"""The tables, as the newest migration leaves them. A test compares the two.

Columns hold what people ask for, JSON holds what is only kept. Rows are added and completed, never deleted.
"""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.types import TypeEngine

SCHEMA = "0003"
"""The newest migration's revision."""

VERSION_TABLE = "mixforge_schema"
"""Where the revision of a database is kept; also the sign that a database is one of ours."""

_NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}
metadata = MetaData(naming_convention=_NAMES)


class Document(TypeDecorator[object]):
    """JSON; on PostgreSQL its binary form, whose module is large and only loaded there."""

    impl = JSON(none_as_null=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[object]:
        if dialect.name != "postgresql":
            return dialect.type_descriptor(self.impl_instance)
        from sqlalchemy.dialects.postgresql import JSONB

        return dialect.type_descriptor(JSONB(none_as_null=True))


# SQLite numbers rows by itself only where the key's type is exactly INTEGER.
Key = BigInteger().with_variant(Integer(), "sqlite")


class Instant(TypeDecorator[datetime]):
    """A moment, stored in UTC without an offset, so that SQLite and PostgreSQL sort it alike."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


campaign = Table(
    "campaign",
    metadata,
    Column("id", Key, primary_key=True, autoincrement=True),
    Column("name", String(200), nullable=False, unique=True),
    Column("digest", String(64), nullable=False),
    Column("text", Text, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("created_at", Instant, nullable=False),
    sqlite_autoincrement=True,
)

# One driver's stretch of work on a campaign. The campaign's hours are the sum of their seconds.
run = Table(
    "run",
    metadata,
    Column("id", Key, primary_key=True, autoincrement=True),
    Column("campaign_id", Key, ForeignKey("campaign.id"), nullable=False, index=True),
    Column("driver", String(200), nullable=False),
    Column("started_at", Instant, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("ended_at", Instant),
    sqlite_autoincrement=True,
)

architecture = Table(
    "architecture",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("text", Text, nullable=False),
    Column("canonical", Text, nullable=False),
    Column("width", Integer, nullable=False),
    Column("depth", Integer, nullable=False),
    # Names of the mixers, sorted, one blank between them.
    Column("mixers", Text, nullable=False),
    Column("created_at", Instant, nullable=False),
)

environment = Table(
    "environment",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("device", String(200), nullable=False),
    Column("device_kind", String(16), nullable=False),
    Column("torch", String(64), nullable=False),
    Column("mixforge", String(64), nullable=False),
    Column("commit", String(64)),
    Column("host", String(64), nullable=False),
    Column("details", Document, nullable=False),
)

trial = Table(
    "trial",
    metadata,
    Column("id", Key, primary_key=True, autoincrement=True),
    Column("campaign_id", Key, ForeignKey("campaign.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("architecture", String(64), ForeignKey("architecture.digest"), nullable=False, index=True),
    Column("budget", String(64), nullable=False),
    Column("origin", String(64), nullable=False),
    Column("parent", String(64), ForeignKey("architecture.digest")),
    Column("second_parent", String(64), ForeignKey("architecture.digest")),
    Column("operator", String(64)),
    Column("state", String(16), nullable=False),
    Column("outcome", String(32)),
    Column("reason", Text),
    # The newest attempt's id; attempts with a smaller one may not record.
    Column("token", Key),
    # Whether a stored evaluation answered this trial.
    Column("reused", Boolean, nullable=False),
    Column("choices", Document, nullable=False),
    Column("attributes", Document, nullable=False),
    # How many drawn architectures were refused before this one, by reason.
    Column("rejected", Document, nullable=False),
    Column("proposed_at", Instant, nullable=False),
    Column("finished_at", Instant),
    Column("bits_per_byte", Float),
    Column("recall", Float),
    Column("copying", Float),
    Column("tracking", Float),
    Column("selectivity", Float),
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
    UniqueConstraint("campaign_id", "number"),
    Index(None, "campaign_id", "state"),
    sqlite_autoincrement=True,
)

attempt = Table(
    "attempt",
    metadata,
    # The fencing token. AUTOINCREMENT, so that SQLite never gives a number twice.
    Column("id", Key, primary_key=True, autoincrement=True),
    Column("trial_id", Key, ForeignKey("trial.id"), nullable=False, index=True),
    Column("stage", String(16), nullable=False),
    Column("worker", String(200), nullable=False),
    Column("started_at", Instant, nullable=False),
    Column("ended_at", Instant),
    Column("seconds", Float),
    # Null where it was abandoned or superseded; the reason says which.
    Column("outcome", String(32)),
    Column("reason", Text),
    Column("trace", Text),
    sqlite_autoincrement=True,
)

evaluation = Table(
    "evaluation",
    metadata,
    Column("id", Key, primary_key=True, autoincrement=True),
    Column("architecture", String(64), ForeignKey("architecture.digest"), nullable=False),
    Column("budget", String(64), nullable=False),
    Column("attempt_id", Key, ForeignKey("attempt.id")),
    Column("outcome", String(32), nullable=False),
    Column("reason", Text),
    Column("trace", Text),
    Column("context", BigInteger, nullable=False),
    Column("params", BigInteger, nullable=False),
    Column("flops", BigInteger, nullable=False),
    Column("state_bytes", BigInteger, nullable=False),
    Column("decode_bytes", BigInteger, nullable=False),
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
    Column("train_tokens", BigInteger, nullable=False),
    Column("train_s", Float, nullable=False),
    Column("curves", Document, nullable=False),
    Column("backend", String(32), nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("environment", String(64), ForeignKey("environment.digest"), nullable=False),
    Column("weights", Text),
    Column("recorded_at", Instant, nullable=False),
    UniqueConstraint("architecture", "budget"),
    sqlite_autoincrement=True,
)

profile = Table(
    "profile",
    metadata,
    Column("id", Key, primary_key=True, autoincrement=True),
    Column("architecture", String(64), ForeignKey("architecture.digest"), nullable=False, index=True),
    # The budget of the trial it was measured for; null where it was measured outside any campaign.
    Column("budget", String(64)),
    Column("attempt_id", Key, ForeignKey("attempt.id")),
    Column("outcome", String(32), nullable=False),
    Column("reason", Text),
    Column("trace", Text),
    Column("batch", BigInteger, nullable=False),
    Column("context", BigInteger, nullable=False),
    Column("dtype", String(16), nullable=False),
    Column("backend", String(32), nullable=False),
    Column("environment", String(64), ForeignKey("environment.digest"), nullable=False),
    Column("prefill_ms", Float),
    Column("prefill_ms_spread", Float),
    Column("decode_ms", Float),
    Column("decode_ms_spread", Float),
    Column("train_ms", Float),
    Column("train_ms_spread", Float),
    Column("peak_bytes", BigInteger),
    # Every raw repeat of every phase.
    Column("timings", Document, nullable=False),
    Column("recorded_at", Instant, nullable=False),
    sqlite_autoincrement=True,
)
