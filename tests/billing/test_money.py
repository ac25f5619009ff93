"""Money is spelled exactly, both ways."""

import ast
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ernie_serve.billing
from ernie_serve.billing.money import MAX_NANO, format_usd, parse_usd
from ernie_serve.errors import SettingsError


@pytest.mark.parametrize(
    ("nano", "text"),
    [
        (0, "0"),
        (1, "0.000000001"),
        (21_000, "0.000021"),
        (-350, "-0.00000035"),
        (5 * 10**9, "5"),
        (-(10**9) - 5 * 10**8, "-1.5"),
        (MAX_NANO, "9223372036.854775807"),
    ],
)
def test_dollars_are_the_shortest_exact_decimal(nano, text):
    assert format_usd(nano) == text
    assert parse_usd(text) == nano


@given(st.integers(-MAX_NANO, MAX_NANO))
def test_every_amount_survives_its_spelling(nano):
    assert parse_usd(format_usd(nano)) == nano
    assert Decimal(format_usd(nano)) * 10**9 == nano


@pytest.mark.parametrize(
    "text", ["", "five", "1e3", "nan", "0.0000000001", "1,5", "--1", "99999999999", ".5", "5.", "٣"]
)
def test_what_is_no_exact_amount_is_refused(text):
    with pytest.raises(SettingsError, match="amount is"):
        parse_usd(text)


def test_no_float_appears_where_money_is():
    for path in Path(ernie_serve.billing.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
            assert name not in ("round", "Float", "Numeric"), f"{path.name}: {name}"
            assert name != "float" or path.name == "clock.py", f"{path.name}: a float"
            assert not isinstance(node, ast.Div) or path.name == "opening.py", f"{path.name} divides"
            number = node.value if isinstance(node, ast.Constant) else None
            assert not isinstance(number, float) or path.name == "database.py", f"{path.name}: {number}"
