"""What was booked by hand has an index of its own: it is found without a look at what requests cost."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the index. It grows with bookings, not with requests."""
    by_hand = sa.text("kind <> 'usage'")
    op.create_index("ledger_by_hand", "ledger", ["id"], sqlite_where=by_hand, postgresql_where=by_hand)
