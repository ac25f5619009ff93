"""What the command line and the admin routes do to accounts and keys."""

import pytest

from ernie_serve.billing.accounts import disable_key, find_key, list_accounts, list_keys, set_limits, touch_key
from ernie_serve.billing.keys import KeyLimits, digest
from ernie_serve.billing.office import office, open_key, the_account, top_up
from ernie_serve.billing.reports import problems
from ernie_serve.errors import SettingsError


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
        assert desk(set_limits, key_id, KeyLimits(requests_per_minute=5))
        assert desk(find_key, key_id).caller.limits == KeyLimits(requests_per_minute=5)
        desk(touch_key, key_id, 50)
        desk(touch_key, key_id, 40)
        assert desk(find_key, key_id).last_used == 50
        assert desk(disable_key, key_id, 60)
        assert desk(disable_key, key_id, 70)
        assert desk(find_key, key_id).disabled == 60
        for change in (disable_key, touch_key):
            assert not desk(change, "none", 1)
        assert not desk(set_limits, "none", KeyLimits())


def test_an_account_is_topped_up_by_name_or_id(url):
    with office(url) as desk:
        account_id = desk(open_key, "k", now=1, account="acme").account_id
        assert desk(top_up, "acme", 5, now=2) == 5
        assert desk(top_up, account_id, -2, now=3, kind="adjust") == 3
        assert desk(the_account, "acme").balance_nano == 3
        with pytest.raises(SettingsError, match="no account `acmee`"):
            desk(top_up, "acmee", 5, now=2)
        with pytest.raises(SettingsError, match="cannot be taken"):
            desk(top_up, "acme", -4, now=4)
        assert desk(problems) == []


@pytest.mark.parametrize("name", ["", " ", "x" * 129, "a\nb", "\x1b[31m"])
def test_a_name_is_printable_and_short(sqlite_url, name):
    with office(sqlite_url) as desk, pytest.raises(SettingsError, match="printable"):
        desk(open_key, name, now=1)
