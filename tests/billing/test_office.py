"""What the command line and the admin routes do to accounts and keys."""

import pytest

from ernie_serve.billing.accounts import disable_key, find_key, list_accounts, list_keys, touch_key
from ernie_serve.billing.keys import KeyLimits, digest
from ernie_serve.billing.office import change_limits, office, open_key, the_account, the_key, top_up
from ernie_serve.billing.reports import problems
from ernie_serve.errors import SettingsError, StartupError


def test_a_key_is_made_with_its_account_and_credit(url):
    with office(url) as desk:
        limits = KeyLimits(requests_per_minute=60, tokens_per_minute=10_000, concurrent=4, month_nano=10**9)
        new = desk(open_key, "laptop", now=7, account="acme", credit_nano=5 * 10**9, limits=limits, expires=99)
        record = desk(find_key, new.key_id)
        assert record.secret_sha256 == digest(new.key)
        assert (record.caller.limits, record.caller.expires, record.account_name) == (limits, 99, "acme")
        assert (new.balance_nano, record.created, record.usable(98), record.usable(99)) == (5 * 10**9, 7, True, False)
        assert new.key not in repr(record)
        assert digest(new.key) not in repr(record)
        again = desk(open_key, "desk", now=8, account="acme", credit_nano=10**9)
        assert (again.account_id, again.project_id, again.balance_nano) == (new.account_id, new.project_id, 6 * 10**9)
        other = desk(open_key, "x", now=8)
        assert other.account_id != new.account_id
        assert [each.name for each in desk(list_accounts)] == ["acme", "default"]
        assert {each.caller.key_name for each in desk(list_keys, new.account_id)} == {"laptop", "desk"}
        assert desk(problems) == []


def test_keys_are_limited_disabled_and_touched(url):
    with office(url) as desk:
        key_id = desk(open_key, "k", now=1).key_id
        changed = desk(change_limits, key_id, {"requests_per_minute": 5, "month_nano": 7})
        assert changed.caller.limits == KeyLimits(requests_per_minute=5, month_nano=7)
        changed = desk(change_limits, key_id, {"requests_per_minute": None, "concurrent": 2})
        assert changed.caller.limits == KeyLimits(concurrent=2, month_nano=7)
        assert desk(change_limits, key_id, {}) == changed == desk.read(find_key, key_id)
        with pytest.raises(SettingsError, match="concurrent is 0"):
            desk(change_limits, key_id, {"concurrent": 0})
        desk(touch_key, key_id, 50)
        desk(touch_key, key_id, 40)
        assert desk(find_key, key_id).last_used == 50
        assert desk(disable_key, key_id, 60)
        assert desk(disable_key, key_id, 70)
        assert desk(find_key, key_id).disabled == 60
        for change in (disable_key, touch_key):
            assert not desk(change, "none", 1)
        with pytest.raises(SettingsError, match="no key `none`"):
            desk(change_limits, "none", {"concurrent": 1})


def test_an_account_is_topped_up_by_name_or_id(url):
    with office(url) as desk:
        account_id = desk(open_key, "k", now=1, account="acme").account_id
        assert desk(top_up, "acme", 5, now=2) == 5
        assert desk(top_up, account_id, -2, now=3, kind="adjust") == 3
        assert desk(the_account, "acme").balance_nano == 3
        with pytest.raises(SettingsError, match="no account `acmee`"):
            desk(top_up, "acmee", 5, now=2)
        with pytest.raises(SettingsError, match="cannot be taken"):
            desk(top_up, "acme", -4, now=4, kind="adjust")
        with pytest.raises(SettingsError, match="below zero"):
            desk(top_up, "acme", -1, now=4)
        assert desk(problems) == []


@pytest.mark.parametrize("name", ["", " ", "x" * 129, "a\nb", "\x1b[31m"])
def test_a_name_is_printable_and_short(sqlite_url, name):
    with office(sqlite_url) as desk, pytest.raises(SettingsError, match="printable"):
        desk(open_key, name, now=1)


def test_a_key_is_found_by_id_by_itself_and_by_a_name_of_its_own(url):
    with office(url) as desk:
        new, other = desk(open_key, "laptop", now=1), desk(open_key, "twin", now=2)
        desk(open_key, "twin", now=3)
        for spelling in (new.key_id, f"sk-{new.key_id}", new.key, "laptop"):
            assert desk(the_key, spelling).caller.key_id == new.key_id
        with pytest.raises(SettingsError, match=f"2 keys have the name `twin`: {other.key_id}, "):
            desk(the_key, "twin")
        for spelling in ("nobody", "", new.key.replace(new.key_id, "0" * 16)):
            with pytest.raises(SettingsError, match="There is no key") as refused:
                desk(the_key, spelling)
            assert new.key.removeprefix(f"sk-{new.key_id}-") not in str(refused.value)


def test_a_reference_stands_for_one_booking(url):
    with office(url) as desk:
        for name in ("a", "b"):
            desk(open_key, name, now=1, account=name)
        assert desk(top_up, "a", 5, now=1, ref="invoice") == 5
        assert desk(top_up, "a", 5, now=1, ref="invoice") == 5
        for account, nano, kind in (("a", 6, "topup"), ("b", 5, "topup"), ("a", 5, "refund")):
            with pytest.raises(SettingsError, match="another booking"):
                desk(top_up, account, nano, now=1, ref="invoice", kind=kind)
        with pytest.raises(SettingsError, match="more than the ledger can hold"):
            desk(top_up, "a", 2**63 - 5, now=1)
        assert {each.name: each.balance_nano for each in desk(list_accounts)} == {"a": 5, "b": 0}
        assert desk(problems) == []


def test_a_store_that_fails_during_a_command_is_told_in_a_line(sqlite_url):
    def fail(connection):
        connection.exec_driver_sql("PRAGMA query_only=1")
        open_key(connection, "k", now=1)

    with (
        pytest.raises(StartupError, match="nothing was changed: attempt to write a readonly"),
        office(sqlite_url) as desk,
    ):
        desk(fail)
