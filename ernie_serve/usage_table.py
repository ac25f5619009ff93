"""What `ernie-serve usage` prints: sums as a table, or every request as CSV or JSON lines.

Knows the reports of the billing store and how they are written for a person. Knows no flag. Days are those of UTC, and
always whole.
"""

import sys
from collections.abc import Mapping, Sequence

from ernie_serve.billing import accounts, office, reports
from ernie_serve.billing.money import format_usd
from ernie_serve.billing.office import Office
from ernie_serve.billing.reports import ExportFormat, Group, Scope, Sums
from ernie_serve.bookkeeping import date_of, opened, parse_time, print_table, time_now
from ernie_serve.errors import SettingsError

Key = tuple[int | str | None, ...]
"""The beginning of a span, `None` without spans, and the ids that were grouped by."""

_GROUPS: dict[str, Group] = {"account": "account_id", "project": "project_id", "key": "key_id", "model": "model"}
_SPANS: dict[str, reports.Width] = {"day": "1d", "hour": "1h"}
_NUMBERS = ("requests", "input", "cached", "output", "reasoning", "cost USD")


def show_usage(url: str | None, *, since: str, until: str | None, by: str, **whose: str | None) -> None:
    """Print requests, tokens and cost, a row for each day, account or whatever `by` names, and their sum."""
    names = [name.strip() for name in by.split(",") if name.strip()]
    spans = [name for name in names if name in _SPANS]
    if len(spans) > 1 or len(set(names)) < len(names) or not {*names} <= {*_SPANS, *_GROUPS}:
        raise SettingsError(f"--by is `{by[:80]}`; name day or hour, and {', '.join(_GROUPS)}, each once.")
    start, end = _span(since, until)
    groups = [_GROUPS[name] for name in names if name in _GROUPS]
    with opened(url) as desk:
        found = _sums(desk, _scope(desk, **whose), start, end, spans, groups)
        labels = _labels(desk)
    rows = sorted([*_heads(names, key, groups, labels), *_numbers(sums)] for key, sums in found.items())
    total = _numbers(reports.add(list(found.values())))
    print_table(
        (*names, *_NUMBERS), [*rows, [*["total", *[""] * len(names)][: len(names)], *total]], numbers={*_NUMBERS}
    )


def export_usage(url: str | None, form: ExportFormat, *, since: str, until: str | None, **whose: str | None) -> None:
    """Write every request between two times to the standard output, as CSV or as JSON lines."""
    start, end = _span(since, until)
    with opened(url) as desk:
        for part in reports.export(desk.read, _scope(desk, **whose), form, start=start, end=end):
            sys.stdout.buffer.write(part)
        sys.stdout.buffer.flush()


def _span(since: str, until: str | None) -> tuple[int, int]:
    now = time_now()
    start = parse_time(since, "--since", now)
    end = now + 1 if until is None else parse_time(until, "--until", now)
    if start >= end:
        raise SettingsError(f"--since {since} is not before {f'--until {until}' if until else 'now'}.")
    return start, end


def _scope(desk: Office, *, account: str | None, project: str | None, key: str | None, model: str | None) -> Scope:
    """Whose usage is wanted, from names or ids. Raises `SettingsError` for what is not there."""
    account_id = None if account is None else desk.read(office.the_account, account).id
    key_id = None if key is None else desk.read(office.the_key, key).caller.key_id
    ids: tuple[str, ...] | None = None
    if project is not None:
        there = desk.read(accounts.list_projects, account_id)
        ids = tuple(each.id for each in there if project in (each.id, each.name))
        if not ids:
            raise SettingsError(f"There is no project `{project[:80]}`. `ernie-serve keys list` shows those in use.")
    return Scope(account_id=account_id, project_id=ids, key_id=key_id, model=model)


def _sums(
    desk: Office, scope: Scope, start: int, end: int, spans: Sequence[str], groups: Sequence[Group]
) -> dict[Key, Sums]:
    """Sums by the beginning of their span, where there is one, and by their groups."""
    width = _SPANS[spans[0]] if spans else "1d"
    found: dict[Key, list[Sums]] = {}
    page: int | None = None
    while True:
        part = desk.read(
            reports.usage_by_time, scope, start=start, end=end, width=width, group_by=groups, limit=168, page=page
        )
        for bucket in part.buckets:
            for sums in bucket.results:
                at = bucket.start if spans else None
                found.setdefault((at, *(getattr(sums, name) for name in groups)), []).append(sums)
        page = part.next_page
        if page is None:
            return {key: reports.add(several) for key, several in found.items()}


def _labels(desk: Office) -> dict[str, str]:
    """The names of accounts, projects and keys by id, with as much of the id as tells them apart."""
    named = {each.id: each.name for each in desk.read(accounts.list_accounts)}
    named |= {each.id: each.name for each in desk.read(accounts.list_projects)}
    keys = desk.read(accounts.list_keys)
    return named | {each.caller.key_id: f"{each.caller.key_name} (sk-{each.caller.key_id})" for each in keys}


def _heads(names: Sequence[str], key: Key, groups: Sequence[Group], labels: Mapping[str, str]) -> list[str]:
    at, *ids = key
    values = dict(zip(groups, ids, strict=True))
    heads = []
    for name in names:
        if name in _SPANS:
            assert isinstance(at, int)
            heads.append(date_of(at)[: 10 if name == "day" else 16])
        else:
            id_ = str(values[_GROUPS[name]])
            heads.append(labels.get(id_, id_))
    return heads


def _numbers(sums: Sums) -> list[str]:
    counts = (sums.requests, sums.prompt, sums.cached, sums.completion, sums.reasoning)
    return [*map(str, counts), format_usd(sums.cost_nano)]
