"""Which request answered a client's idempotency key.

Knows the table. Keeps no answer, because no text belongs into this store, and not the client's key either but its
SHA-256. Whoever serves the answers keeps them, by request id, for as long as it likes.
"""

import hashlib
from dataclasses import dataclass

from sqlalchemy import Connection, delete, select, update
from sqlalchemy.dialects import postgresql, sqlite

from ernie_serve.billing.schema import boot, idempotency
from ernie_serve.errors import IdempotencyMismatch, InvalidRequest, RequestConflict

LIFETIME_SECONDS = 86_400
_MAX_KEY = 255


@dataclass(frozen=True, slots=True)
class Earlier:
    """The request that answered, or is answering, the same key. `body_sha256` is that of what it asked."""

    request_id: str
    body_sha256: str
    finished: bool


def begin(
    connection: Connection, key_id: str, key: str, body_sha256: str, request_id: str, boot_id: str, now: int
) -> Earlier | None:
    """Claim a key for a request; or the request that has it."""
    key_sha256 = hash_key(key)
    mine = (idempotency.c.key_id == key_id) & (idempotency.c.key_sha256 == key_sha256)
    connection.execute(delete(idempotency).where(mine, idempotency.c.expires <= now))
    row = {
        "key_id": key_id,
        "key_sha256": key_sha256,
        "body_sha256": body_sha256,
        "request_id": request_id,
        "state": "running",
        "boot_id": boot_id,
        "expires": now + LIFETIME_SECONDS,
    }
    if connection.execute(_CLAIM[connection.dialect.name], row).scalar() is not None:
        return None
    kept = connection.execute(select(idempotency).where(mine)).one()
    return Earlier(kept.request_id, kept.body_sha256, kept.state == "finished")


def end(connection: Connection, request_id: str, *, answered: bool) -> None:
    """A request has ended: keep its claim when it was answered, give it up for another attempt when not."""
    mine = idempotency.c.request_id == request_id
    if answered:
        connection.execute(update(idempotency).where(mine).values(state="finished"))
    else:
        connection.execute(delete(idempotency).where(mine))


def forget_old(connection: Connection, now: int) -> None:
    """Give up claims that are too old."""
    connection.execute(delete(idempotency).where(idempotency.c.expires <= now))


def forget_dead(connection: Connection, alive_since: int) -> None:
    """Give up the claims of processes that are gone."""
    alive = select(boot.c.id).where(boot.c.heartbeat >= alive_since)
    running = idempotency.c.state == "running"
    connection.execute(delete(idempotency).where(running, idempotency.c.boot_id.not_in(alive)))


def hash_key(key: str) -> str:
    """What is stored of a client's key. Raises `InvalidRequest` for one that is empty or too long."""
    if not 0 < len(key) <= _MAX_KEY:
        raise InvalidRequest(f"`Idempotency-Key` has {len(key)} characters; send 1 to {_MAX_KEY}.")
    return hashlib.sha256(key.encode()).hexdigest()


def replayed(earlier: Earlier, body_sha256: str) -> str:
    """The id of the request whose answer is to be sent again.

    Raises `IdempotencyMismatch` where that asked something else, `RequestConflict` where it still runs.
    """
    if earlier.body_sha256 != body_sha256:
        raise IdempotencyMismatch(
            "This `Idempotency-Key` was used for another body. Send a new key with a new request."
        )
    if not earlier.finished:
        raise RequestConflict(
            "The request with this `Idempotency-Key` still runs. Try again later.", retry_after_seconds=1
        )
    return earlier.request_id


_CLAIM = {
    "sqlite": sqlite.insert(idempotency).on_conflict_do_nothing().returning(idempotency.c.request_id),
    "postgresql": postgresql.insert(idempotency).on_conflict_do_nothing().returning(idempotency.c.request_id),
}
