"""The score of SelectivBench, with its test score."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

TRIALS = """
CREATE VIEW trials AS
SELECT trial.id, campaign.name AS campaign, trial.number,
    architecture.digest, architecture.text AS architecture, architecture.width, architecture.depth,
    architecture.mixers,
    trial.budget, trial.origin, trial.operator, trial.parent, trial.second_parent,
    trial.state, trial.outcome, trial.reason, trial.reused,
    trial.bits_per_byte, evaluation.bits_per_byte_test, trial.recall, evaluation.recall_test,
    trial.copying, evaluation.copying_test, trial.tracking, evaluation.tracking_test,
    trial.selectivity, evaluation.selectivity_test,
    trial.prefill_ms, trial.prefill_ms_spread, trial.decode_ms, trial.decode_ms_spread,
    trial.train_ms, trial.train_ms_spread, trial.peak_bytes,
    trial.params, trial.flops, trial.state_bytes, trial.decode_bytes,
    evaluation.train_tokens, evaluation.train_s, trial.proposed_at, trial.finished_at
FROM trial
JOIN campaign ON campaign.id = trial.campaign_id
JOIN architecture ON architecture.digest = trial.architecture
LEFT JOIN evaluation ON evaluation.architecture = trial.architecture AND evaluation.budget = trial.budget
"""


def upgrade() -> None:
    op.add_column("trial", sa.Column("selectivity", sa.Float(), nullable=True))
    op.add_column("evaluation", sa.Column("selectivity", sa.Float(), nullable=True))
    op.add_column("evaluation", sa.Column("selectivity_test", sa.Float(), nullable=True))
    op.execute("DROP VIEW trials")
    op.execute(TRIALS)
