"""What was said, and the keys it was said with, are nowhere but in the answer."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from stores import Shop

from ernie_serve.api.app import create_app
from ernie_serve.billing.keys import KeyLimits
from ernie_serve.billing.prices import Prices

PROMPT, ANSWER = "canary-in-the-prompt", "canary-in-the-answer"


def test_canaries_are_in_no_log_no_store_and_no_metric(
    small_shop: Shop,
    make_services: Any,
    engine: Any,
    post: Any,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG)
    engine.reply = ANSWER * 3
    secrets = [PROMPT, ANSWER, "canary-idempotency"]
    seen: list[str] = []

    async def scenario() -> None:
        async with small_shop.open(Prices()) as meter:
            app = create_app(make_services(meter=meter, max_model_len=4096))
            key = (await small_shop.new_key(meter, limits=KeyLimits(requests_per_minute=1000))).key
            poor = (await small_shop.new_key(meter, 0, account="poor")).key
            secrets.extend([key, *(each.split("-", 2)[2] for each in (key, poor))])  # a secret may have a "-" itself
            chat = {"model": "ernie", "messages": [{"role": "user", "content": PROMPT}]}
            asked: list[tuple[str, dict[str, Any]]] = [
                ("/v1/completions", {"model": "ernie", "prompt": PROMPT, "unknown_field": PROMPT, "user": PROMPT}),
                ("/v1/chat/completions", chat),
                ("/v1/responses", {"model": "ernie", "input": PROMPT}),
            ]
            for path, body in asked:
                for stream in (False, True):
                    headers = {"idempotency-key": f"canary-idempotency-{stream}-{path}"}
                    body = {**body, "stream": stream}
                    heard = await post(app, path, body, key, headers=headers)
                    assert heard.status == 200
                    await post(app, path, body, key, headers=headers)  # replayed, or a conflict
                    await post(app, path, {**body, "top_p": 0.5}, key, headers=headers)  # another body
                    await post(app, path, body, key, leave_after=2)
                    assert (await post(app, path, body, poor)).status == 402
                    assert (await post(app, path, body, key[:-1] + "x")).status == 401
                    assert (await post(app, path, {**body, "temperature": PROMPT}, key)).status == 400
                    engine.break_after, engine.breakage = 2, RuntimeError(ANSWER)
                    await post(app, path, body, key)
                    engine.break_after = None
                    with monkeypatch.context() as patch:
                        patch.setattr(meter._store, "submit", broken)
                        await post(app, path, body, key)
            seen.append(repr(meter.counters))
            seen.append(repr(await meter.report(everything)))

    asyncio.run(scenario())
    folder = Path(small_shop.url.removeprefix("sqlite:///")).parent
    files = [path.read_bytes() for path in folder.iterdir() if path.is_file()]
    assert len(files) >= 2
    told = capfd.readouterr()
    logged = [record.getMessage() + str(record.exc_text or "") for record in caplog.records]
    assert logged, "nothing was logged, so nothing was tested"
    texts = [caplog.text, told.out, told.err, *logged, *seen]
    everywhere = b"\n".join([*files, *(text.encode() for text in texts)])
    for secret in secrets:
        assert secret.encode() not in everywhere, secret[:6]


def broken(*args: Any, **given: Any) -> Any:
    raise RuntimeError(PROMPT)


def everything(connection: Any) -> list[Any]:
    """Every row of every table."""
    from sqlalchemy import select

    from ernie_serve.billing.schema import metadata

    return [tuple(row) for table in metadata.tables.values() for row in connection.execute(select(table))]
