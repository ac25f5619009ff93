"""Statements that are spelled once say what SQLAlchemy would have made of them."""

import asyncio

import pytest
from sqlalchemy import bindparam, insert, select, update
from sqlalchemy.exc import IntegrityError

from ernie_serve.billing.prepared import Prepared
from ernie_serve.billing.schema import account

ROW = {"id": "a", "name": "n", "balance_nano": 5, "reserved_nano": 1, "status": "active", "created": 1}
ADD = Prepared(insert(account))
BALANCE = Prepared(select(account.c.balance_nano).where(account.c.id == bindparam("row_id")))
SPEND = Prepared(
    update(account)
    .where(account.c.id == bindparam("row_id"), account.c.status == "active")
    .values(balance_nano=account.c.balance_nano - bindparam("cost"))
)
CLOSE = Prepared(
    update(account)
    .where(account.c.id == bindparam("row_id"))
    .values(status=bindparam("to"))
    .returning(account.c.balance_nano)
)
CLOSE_ALL = Prepared(
    update(account)
    .where(account.c.id.in_(bindparam("row_ids", expanding=True)), account.c.status == "active")
    .values(status=bindparam("to"))
    .returning(account.c.id, account.c.balance_nano)
)


def test_they_insert_and_change_many_rows_at_once(shop):
    def statements(connection):
        ADD.inserted(connection, [ROW | {"id": each, "name": each, "balance_nano": ord(each)} for each in "abc"])
        closed = CLOSE_ALL.rows(connection, {"row_ids": ["a", "c", "d"], "to": "disabled"})
        assert sorted(map(tuple, closed)) == [("a", 97), ("c", 99)]
        assert CLOSE_ALL.rows(connection, {"row_ids": ["a"], "to": "disabled"}) == []
        assert [BALANCE.value(connection, {"row_id": each}) for each in "abc"] == [97, 98, 99]
        connection.rollback()

    async def scenario():
        async with shop.open() as meter:
            await meter.report(statements)

    asyncio.run(scenario())


def test_they_change_rows_count_them_and_read_values(shop):
    def statements(connection):
        ADD.changed(connection, ROW)
        assert BALANCE.value(connection, {"row_id": "a"}) == 5
        assert BALANCE.value(connection, {"row_id": "b"}) is None
        assert SPEND.changed(connection, {"row_id": "a", "cost": 3}) == 1
        assert SPEND.changed(connection, {"row_id": "b", "cost": 3}) == 0
        assert CLOSE.value(connection, {"row_id": "a", "to": "disabled"}) == 2
        assert SPEND.changed(connection, {"row_id": "a", "cost": 1}) == 0
        assert CLOSE.value(connection, {"row_id": "b", "to": "disabled"}) is None
        connection.rollback()

    async def scenario():
        async with shop.open() as meter:
            await meter.report(statements)

    asyncio.run(scenario())


def test_what_a_table_forbids_is_no_failure_of_the_database(shop):
    async def scenario():
        async with shop.open() as meter:
            for wrong in ({"balance_nano": 0}, {"status": "other"}):
                with pytest.raises(IntegrityError):
                    await meter.change(lambda connection, row=ROW | wrong: ADD.changed(connection, row))
            assert await meter.report(lambda connection: BALANCE.value(connection, {"row_id": "a"})) is None

    asyncio.run(scenario())
