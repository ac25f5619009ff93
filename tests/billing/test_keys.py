"""Keys: what they look like and what is kept of them."""

import pytest

from ernie_serve.billing.keys import Caller, KeyLimits, digest, new_key, parse_scopes, public_id_of, same
from ernie_serve.errors import Forbidden, SettingsError


def test_a_key_has_a_public_id_and_two_hundred_and_fifty_six_bits():
    key, public_id = new_key()
    assert key.startswith(f"sk-{public_id}-")
    assert public_id_of(key) == public_id
    assert len(key) == len("sk-") + 16 + 1 + 43
    assert len({new_key()[0] for _ in range(100)}) == 100


def test_only_the_digest_knows_the_key():
    key, _ = new_key()
    assert same(key, digest(key))
    assert not same(key[:-1], digest(key))
    assert not same(key, "")
    assert key not in digest(key)


@pytest.mark.parametrize(
    "text", ["", "sk-", "sk-0123456789abcdef-", "Bearer x", "sk-0123456789abcdef-" + "é" * 43, "k" * 9999]
)
def test_what_cannot_be_a_key_has_no_public_id(text):
    assert public_id_of(text) is None


def test_scopes_open_what_they_say_and_admin_everything():
    reader = Caller(account_id="a", project_id="p", key_id="k", scopes=frozenset(["read-usage"]))
    reader.require("read-usage")
    for scope in ("inference", "metrics", "admin"):
        with pytest.raises(Forbidden, match=scope):
            reader.require(scope)
    Caller(account_id="a", project_id="p", key_id="k", scopes=frozenset(["admin"])).require("inference")


def test_scopes_are_named_with_commas():
    assert parse_scopes("read-usage, inference") == ("inference", "read-usage")
    for names in ("", ",", "inference,root"):
        with pytest.raises(SettingsError, match="there are inference, read-usage, metrics, admin"):
            parse_scopes(names)


@pytest.mark.parametrize("given", [{"requests_per_minute": 0}, {"tokens_per_minute": -1}, {"month_nano": -1}])
def test_a_limit_below_its_least_is_refused(given):
    with pytest.raises(SettingsError, match=next(iter(given))):
        KeyLimits(**given)
