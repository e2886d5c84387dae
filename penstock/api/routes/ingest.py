"""What drivers send: their events; they are answered once these are committed."""

from __future__ import annotations

import asyncio
import re
import zlib
from typing import Any

import msgpack
from fastapi import APIRouter, HTTPException, Request

from penstock.api.auth import Scope, needs
from penstock.api.guard import INGEST_BODY
from penstock.api.routes import PREFIX, PROBLEMS, service_of
from penstock.api.schemas import Acknowledged
from penstock.api.writer import Unavailable
from penstock.engine.spool import Batch

router = APIRouter(prefix=PREFIX, dependencies=[needs(Scope.RUN)], responses=PROBLEMS, tags=["drivers"])

EXPANDED = 16 << 20
EVENTS = 20_000
PATIENCE = 30.0
_WRITER = re.compile("[0-9a-f]{32}")
_BODY = {
    "required": True,
    "description": "`{writer, first, payloads}` as msgpack, zlib (deflate) allowed; see `penstock.engine.events`.",
    "content": {"application/msgpack": {"schema": {"type": "string", "format": "binary"}}},
}


@router.post("/ingest", response_model=Acknowledged, openapi_extra={"requestBody": _BODY})
async def ingest(request: Request) -> Any:
    """Commit consecutive events of one writer.

    The answer is sent after the commit, and says up to which event everything of the writer is
    committed. What was sent before changes nothing when it comes again. 503 means that nothing is
    acknowledged: send it again later.
    """
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/msgpack":
        raise HTTPException(415, "A batch is sent as application/msgpack.")
    packed = await request.body()
    batch = _read(_expanded(packed, request.headers.get("content-encoding", "identity")))
    try:
        done = service_of(request).writer.commit(batch)
        committed = await asyncio.wait_for(asyncio.wrap_future(done), PATIENCE)
    except TimeoutError:
        raise HTTPException(503, "The database did not commit in time.", {"Retry-After": "1"}) from None
    except Unavailable as error:
        raise HTTPException(503, f"Nothing can be written now: {error}", {"Retry-After": "1"}) from None
    return {"writer": batch.writer, "last": batch.last, "acked_seq": committed}


def _expanded(packed: bytes, encoding: str) -> bytes:
    if encoding == "identity":
        return packed
    if encoding != "deflate":
        raise HTTPException(415, "A batch is sent as it is, or with Content-Encoding: deflate.")
    unpacking = zlib.decompressobj()
    try:
        data = unpacking.decompress(packed, EXPANDED)
    except zlib.error:
        raise HTTPException(400, "The body is not what its Content-Encoding says.") from None
    if unpacking.unconsumed_tail:
        raise HTTPException(413, f"A batch holds at most {EXPANDED} bytes; this one has more.")
    if not unpacking.eof:
        raise HTTPException(400, "The body ends too early.")
    return data


def _read(data: bytes) -> Batch:
    try:
        found = msgpack.unpackb(
            data,
            raw=False,
            max_array_len=EVENTS,
            max_map_len=16,
            max_ext_len=0,
            max_str_len=64,
            max_bin_len=EXPANDED,
        )
        writer, first, payloads = found["writer"], found["first"], found["payloads"]
        sound = (
            type(writer) is str
            and _WRITER.fullmatch(writer)
            and type(first) is int
            and 1 <= first < 1 << 53
            and type(payloads) is list
            and len(payloads) > 0
            and all(type(payload) is bytes for payload in payloads)
        )
    except Exception:  # whatever an unpacker can raise, the body is to blame
        sound = False
    if not sound:
        raise HTTPException(400, "The body is no batch of events.")
    return Batch(writer, first, payloads)


assert INGEST_BODY < EXPANDED
