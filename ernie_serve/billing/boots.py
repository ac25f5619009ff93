"""Which processes live, and what becomes of the holds of those that do not, as SQL.

Knows the tables. Knows no thread and no meter. A boot is one run of one server process.
"""

from sqlalchemy import ColumnElement, Connection, delete, insert, literal_column, select, update

from ernie_serve.billing.ledger import give_back
from ernie_serve.billing.schema import boot, reservation

DEAD_SECONDS = 60
"""After this long without a heartbeat a replica is taken for dead, and its holds are released."""


def database_time(connection: Connection) -> int:
    """Seconds by the database's clock, which all replicas share."""
    clock = (
        "unixepoch()"
        if connection.dialect.name == "sqlite"
        else "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS BIGINT)"
    )
    return int(connection.execute(select(literal_column(clock))).scalar_one())


def beat(connection: Connection, boot_id: str, now: int) -> None:
    """Say that this process lives."""
    if not connection.execute(update(boot).where(boot.c.id == boot_id).values(heartbeat=now)).rowcount:
        connection.execute(insert(boot).values(id=boot_id, started=now, heartbeat=now))


def retire(connection: Connection, boot_id: str) -> None:
    """Say that this process ends: whatever it still holds may be released."""
    connection.execute(delete(boot).where(boot.c.id == boot_id))


def bury_others(connection: Connection, boot_id: str) -> None:
    """Say that no other process lives: this one has the database to itself."""
    connection.execute(delete(boot).where(boot.c.id != boot_id))


def anybody_lives(connection: Connection) -> bool:
    """Whether a replica has been heard of lately."""
    lately = database_time(connection) - DEAD_SECONDS
    return connection.execute(select(boot.c.id).where(boot.c.heartbeat > lately).limit(1)).first() is not None


def orphaned_accounts(connection: Connection, alive_since: int) -> list[str]:
    """Accounts with holds of processes that have not been heard of since."""
    dead = _held_by_dead(alive_since)
    return list(connection.execute(select(reservation.c.account_id).where(dead).distinct()).scalars())


def release_orphans(connection: Connection, account_id: str, alive_since: int) -> int:
    """Release an account's holds of dead processes; return how many there were."""
    dead = _held_by_dead(alive_since) & (reservation.c.account_id == account_id)
    amounts = list(connection.execute(delete(reservation).where(dead).returning(reservation.c.amount_nano)).scalars())
    if amounts:
        give_back(connection, account_id, sum(amounts))
    return len(amounts)


def forget_old(connection: Connection, before: int) -> None:
    """Delete processes that have not been heard of since."""
    connection.execute(delete(boot).where(boot.c.heartbeat < before))


def _held_by_dead(alive_since: int) -> ColumnElement[bool]:
    alive = select(boot.c.id).where(boot.c.heartbeat >= alive_since)
    return reservation.c.boot_id.not_in(alive)
