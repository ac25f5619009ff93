"""From the bytes of a request to a JSON object, within bounds.

Knows sizes, encodings and depth. Knows no field.
"""

import asyncio
from typing import Any

import orjson
from starlette.requests import Request

from ernie_serve.api.connection import ClientLeft
from ernie_serve.api.services import Limits
from ernie_serve.errors import InvalidRequest, RequestTimeout, RequestTooLarge, UnsupportedMedia

MAX_DEPTH = 64


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body, counted while it is read.

    Raises `UnsupportedMedia` for what is compressed or no JSON, `RequestTooLarge`, and `RequestTimeout` for a
    client that sends too slowly. JSON's media type is insisted on because a web page may send any other one
    to a server on its visitor's machine without asking.
    """
    headers = request.headers
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise UnsupportedMedia("Compressed requests are not read. Send the body without Content-Encoding.")
    media = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise UnsupportedMedia("The body must be JSON. Send it with the header `Content-Type: application/json`.")
    declared = headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limits.max_body_bytes:
        raise _too_large(limits.max_body_bytes)
    try:
        async with asyncio.timeout(limits.body_seconds):
            return await _collect(request, limits.max_body_bytes)
    except TimeoutError:
        told = f"The body did not arrive within {limits.body_seconds:g} seconds."
        raise RequestTimeout(told) from None


async def _collect(request: Request, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"The body is larger than {limit} bytes, the most this server reads. Send less at once.")


def parse_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object. Raises `InvalidRequest` for anything else."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        told = f"The body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        raise InvalidRequest(told) from None
    if not isinstance(value, dict):
        raise InvalidRequest('The body must be a JSON object, like {"model": …}.')
    if deeper_than(value, MAX_DEPTH):
        raise InvalidRequest(f"The body nests deeper than {MAX_DEPTH} levels.")
    return value


def deeper_than(value: object, limit: int) -> bool:
    """Whether lists and objects nest in more than `limit` levels; walks level by level, so depth costs no stack."""
    level = [value]
    for _ in range(limit):
        children: list[object] = []
        for node in level:
            if isinstance(node, dict):
                children += node.values()
            elif isinstance(node, list):
                children += node
        level = [child for child in children if isinstance(child, dict | list)]
        if not level:
            return False
    return True
