"""The first schema."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
DOCUMENT = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")

TRIALS = """
CREATE VIEW trials AS
SELECT trial.id, campaign.name AS campaign, trial.number,
    architecture.digest, architecture.text AS architecture, architecture.width, architecture.depth,
    architecture.mixers,
    trial.budget, trial.origin, trial.operator, trial.parent, trial.second_parent,
    trial.state, trial.outcome, trial.reason, trial.reused,
    trial.bits_per_byte, evaluation.bits_per_byte_test, trial.recall, evaluation.recall_test,
    trial.prefill_ms, trial.prefill_ms_spread, trial.decode_ms, trial.decode_ms_spread,
    trial.train_ms, trial.train_ms_spread, trial.peak_bytes,
    trial.params, trial.flops, trial.state_bytes, trial.decode_bytes,
    evaluation.train_tokens, evaluation.train_s, trial.proposed_at, trial.finished_at
FROM trial
JOIN campaign ON campaign.id = trial.campaign_id
JOIN architecture ON architecture.digest = trial.architecture
LEFT JOIN evaluation ON evaluation.architecture = trial.architecture AND evaluation.budget = trial.budget
"""

PROGRESS = """
CREATE VIEW progress AS
SELECT campaign.name AS campaign, trial.origin, trial.state, trial.outcome,
    count(*) AS trials, sum(CASE WHEN trial.reused THEN 1 ELSE 0 END) AS reused
FROM trial
JOIN campaign ON campaign.id = trial.campaign_id
GROUP BY campaign.name, trial.origin, trial.state, trial.outcome
"""

FAILURES = """
CREATE VIEW failures AS
SELECT campaign.name AS campaign, trial.number, architecture.digest, architecture.text AS architecture,
    attempt.stage, attempt.worker, attempt.outcome, attempt.reason,
    attempt.started_at, attempt.ended_at, attempt.seconds
FROM attempt
JOIN trial ON trial.id = attempt.trial_id
JOIN campaign ON campaign.id = trial.campaign_id
JOIN architecture ON architecture.digest = trial.architecture
WHERE attempt.ended_at IS NOT NULL AND (attempt.outcome IS NULL OR attempt.outcome <> 'ok')
"""

PROFILES = """
CREATE VIEW profiles AS
SELECT profile.id, architecture.digest, architecture.text AS architecture, profile.outcome,
    environment.device, profile.batch, profile.context, profile.dtype, profile.backend,
    profile.prefill_ms, profile.prefill_ms_spread, profile.decode_ms, profile.decode_ms_spread,
    profile.train_ms, profile.train_ms_spread, profile.peak_bytes, profile.recorded_at
FROM profile
JOIN architecture ON architecture.digest = profile.architecture
JOIN environment ON environment.digest = profile.environment
"""


def upgrade() -> None:
    op.create_table(
        "architecture",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("canonical", sa.Text(), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("depth", sa.Integer(), nullable=False),
        sa.Column("mixers", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_architecture"),
    )
    op.create_table(
        "campaign",
        sa.Column("id", KEY, autoincrement=True, nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_campaign"),
        sa.UniqueConstraint("name", name="uq_campaign_name"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "environment",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("device", sa.String(length=200), nullable=False),
        sa.Column("device_kind", sa.String(length=16), nullable=False),
        sa.Column("torch", sa.String(length=64), nullable=False),
        sa.Column("mixforge", sa.String(length=64), nullable=False),
        sa.Column("commit", sa.String(length=64), nullable=True),
        sa.Column("host", sa.String(length=64), nullable=False),
        sa.Column("details", DOCUMENT, nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_environment"),
    )
    op.create_table(
        "run",
        sa.Column("id", KEY, autoincrement=True, nullable=False),
        sa.Column("campaign_id", KEY, nullable=False),
        sa.Column("driver", sa.String(length=200), nullable=False),
        sa.Column("started_at", sa.DateTime(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("ended_at", sa.DateTime(), nullable=True),
        sa.ForeignKeyConstraint(["campaign_id"], ["campaign.id"], name="fk_run_campaign_id"),
        sa.PrimaryKeyConstraint("id", name="pk_run"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_run_campaign_id", "run", ["campaign_id"])

    op.create_table(
        "trial",
        sa.Column("id", KEY, autoincrement=True, nullable=False),
        sa.Column("campaign_id", KEY, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("architecture", sa.String(length=64), nullable=False),
        sa.Column("budget", sa.String(length=64), nullable=False),
        sa.Column("origin", sa.String(length=64), nullable=False),
        sa.Column("parent", sa.String(length=64), nullable=True),
        sa.Column("second_parent", sa.String(length=64), nullable=True),
        sa.Column("operator", sa.String(length=64), nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("outcome", sa.String(length=32), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("token", KEY, nullable=True),
        sa.Column("reused", sa.Boolean(), nullable=False),
        sa.Column("choices", DOCUMENT, nullable=False),
        sa.Column("attributes", DOCUMENT, nullable=False),
        sa.Column("rejected", DOCUMENT, nullable=False),
        sa.Column("proposed_at", sa.DateTime(), nullable=False),
        sa.Column("finished_at", sa.DateTime(), nullable=True),
        sa.Column("bits_per_byte", sa.Float(), nullable=True),
        sa.Column("recall", sa.Float(), nullable=True),
        sa.Column("prefill_ms", sa.Float(), nullable=True),
        sa.Column("prefill_ms_spread", sa.Float(), nullable=True),
        sa.Column("decode_ms", sa.Float(), nullable=True),
        sa.Column("decode_ms_spread", sa.Float(), nullable=True),
        sa.Column("train_ms", sa.Float(), nullable=True),
        sa.Column("train_ms_spread", sa.Float(), nullable=True),
        sa.Column("peak_bytes", sa.BigInteger(), nullable=True),
        sa.Column("params", sa.BigInteger(), nullable=True),
        sa.Column("flops", sa.BigInteger(), nullable=True),
        sa.Column("state_bytes", sa.BigInteger(), nullable=True),
        sa.Column("decode_bytes", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["architecture"], ["architecture.digest"], name="fk_trial_architecture"),
        sa.ForeignKeyConstraint(["campaign_id"], ["campaign.id"], name="fk_trial_campaign_id"),
        sa.ForeignKeyConstraint(["parent"], ["architecture.digest"], name="fk_trial_parent"),
        sa.ForeignKeyConstraint(["second_parent"], ["architecture.digest"], name="fk_trial_second_parent"),
        sa.PrimaryKeyConstraint("id", name="pk_trial"),
        sa.UniqueConstraint("campaign_id", "number", name="uq_trial_campaign_id_number"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_trial_architecture", "trial", ["architecture"])
    op.create_index("ix_trial_campaign_id_state", "trial", ["campaign_id", "state"])

    op.create_table(
        "attempt",
        sa.Column("id", KEY, autoincrement=True, nullable=False),
        sa.Column("trial_id", KEY, nullable=False),
        sa.Column("stage", sa.String(length=16), nullable=False),
        sa.Column("worker", sa.String(length=200), nullable=False),
        sa.Column("started_at", sa.DateTime(), nullable=False),
        sa.Column("ended_at", sa.DateTime(), nullable=True),
        sa.Column("seconds", sa.Float(), nullable=True),
        sa.Column("outcome", sa.String(length=32), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("trace", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["trial_id"], ["trial.id"], name="fk_attempt_trial_id"),
        sa.PrimaryKeyConstraint("id", name="pk_attempt"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_attempt_trial_id", "attempt", ["trial_id"])

    op.create_table(
        "evaluation",
        sa.Column("id", KEY, autoincrement=True, nullable=False),
        sa.Column("architecture", sa.String(length=64), nullable=False),
        sa.Column("budget", sa.String(length=64), nullable=False),
        sa.Column("attempt_id", KEY, nullable=True),
        sa.Column("outcome", sa.String(length=32), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("trace", sa.Text(), nullable=True),
        sa.Column("context", sa.BigInteger(), nullable=False),
        sa.Column("params", sa.BigInteger(), nullable=False),
        sa.Column("flops", sa.BigInteger(), nullable=False),
        sa.Column("state_bytes", sa.BigInteger(), nullable=False),
        sa.Column("decode_bytes", sa.BigInteger(), nullable=False),
        sa.Column("bits_per_byte", sa.Float(), nullable=True),
        sa.Column("bits_per_byte_test", sa.Float(), nullable=True),
        sa.Column("recall", sa.Float(), nullable=True),
        sa.Column("recall_test", sa.Float(), nullable=True),
        sa.Column("train_tokens", sa.BigInteger(), nullable=False),
        sa.Column("train_s", sa.Float(), nullable=False),
        sa.Column("curves", DOCUMENT, nullable=False),
        sa.Column("backend", sa.String(length=32), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("environment", sa.String(length=64), nullable=False),
        sa.Column("weights", sa.Text(), nullable=True),
        sa.Column("recorded_at", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(["architecture"], ["architecture.digest"], name="fk_evaluation_architecture"),
        sa.ForeignKeyConstraint(["attempt_id"], ["attempt.id"], name="fk_evaluation_attempt_id"),
        sa.ForeignKeyConstraint(["environment"], ["environment.digest"], name="fk_evaluation_environment"),
        sa.PrimaryKeyConstraint("id", name="pk_evaluation"),
        sa.UniqueConstraint("architecture", "budget", name="uq_evaluation_architecture_budget"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "profile",
        sa.Column("id", KEY, autoincrement=True, nullable=False),
        sa.Column("architecture", sa.String(length=64), nullable=False),
        sa.Column("budget", sa.String(length=64), nullable=True),
        sa.Column("attempt_id", KEY, nullable=True),
        sa.Column("outcome", sa.String(length=32), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("trace", sa.Text(), nullable=True),
        sa.Column("batch", sa.BigInteger(), nullable=False),
        sa.Column("context", sa.BigInteger(), nullable=False),
        sa.Column("dtype", sa.String(length=16), nullable=False),
        sa.Column("backend", sa.String(length=32), nullable=False),
        sa.Column("environment", sa.String(length=64), nullable=False),
        sa.Column("prefill_ms", sa.Float(), nullable=True),
        sa.Column("prefill_ms_spread", sa.Float(), nullable=True),
        sa.Column("decode_ms", sa.Float(), nullable=True),
        sa.Column("decode_ms_spread", sa.Float(), nullable=True),
        sa.Column("train_ms", sa.Float(), nullable=True),
        sa.Column("train_ms_spread", sa.Float(), nullable=True),
        sa.Column("peak_bytes", sa.BigInteger(), nullable=True),
        sa.Column("timings", DOCUMENT, nullable=False),
        sa.Column("recorded_at", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(["architecture"], ["architecture.digest"], name="fk_profile_architecture"),
        sa.ForeignKeyConstraint(["attempt_id"], ["attempt.id"], name="fk_profile_attempt_id"),
        sa.ForeignKeyConstraint(["environment"], ["environment.digest"], name="fk_profile_environment"),
        sa.PrimaryKeyConstraint("id", name="pk_profile"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_profile_architecture", "profile", ["architecture"])
    for view in (TRIALS, PROGRESS, FAILURES, PROFILES):
        op.execute(view)
