"""Programs for a storm: a driver that keeps a ledger of its own, and a server that treats what it hears badly."""

DRIVER = """
import os, sys
from penstock import flow, task
from penstock.runtime import task_run


def enter():
    handle = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(handle, f"{task_run.id} {task_run.run_count}\\n".encode())
    os.close(handle)


@task(retries=1)
def step(number):
    enter()
    if number % 7 == 3 and task_run.run_count == 1:
        raise ValueError("the first time it fails")
    return number


@task
def element(number):
    enter()
    return number


@flow(task_runner=sys.argv[1])
def work(count: int):
    steps = [step.submit(number) for number in range(count)]
    total = sum(element.map(range(count)).result())
    assert total == sum(one.result() for one in steps) == count * (count - 1) // 2


if __name__ == "__main__":
    while True:
        work(int(sys.argv[2]))
"""
"""Arguments: the runner, and how many tasks a flow has of each of two kinds."""

SERVER = """
import asyncio, os, random, sys, zlib
import msgpack
from starlette.responses import Response
import penstock.api.app, penstock.api.server
from penstock.cli import main

chance = random.Random(os.getpid())
made = penstock.api.app.create_app
earlier = []


def packed(batch, start, end):
    some = {"writer": batch["writer"], "first": batch["first"] + start, "payloads": batch["payloads"][start:end]}
    return msgpack.packb(some)


class Storm:
    # Refuses and cuts; repeats old batches, and splits new ones, whose halves come in the wrong order.
    def __init__(self, app):
        self.app, self.state, self.routes = app, app.state, app.routes

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or not scope["path"].endswith("/ingest"):
            return await self.app(scope, receive, send)
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        kind = chance.random()
        if kind < 0.04:
            return await Response("no", 500)(scope, receive, send)
        if kind < 0.06:
            return await Response("<html>Welcome to the hotel's network</html>", 200)(scope, receive, send)
        if kind < 0.08:
            other = b'{"writer": "' + b"0" * 32 + b'", "last": 1, "acked_seq": 99999999}'
            return await Response(other, 200, media_type="application/json")(scope, receive, send)
        if kind < 0.30:
            await self.mix(scope, body)
        if kind < 0.34:
            await asyncio.sleep(chance.random() * 0.5)

        async def failing(message):
            if 0.34 < kind < 0.40 and message["type"] == "http.response.start":
                message = {**message, "status": chance.choice([500, 502, 503])}
            if 0.40 < kind < 0.43 and message["type"] == "http.response.body":
                await send({"type": "http.response.body", "body": message["body"][:5], "more_body": True})
                raise RuntimeError("cut")
            await send(message)

        await self.ask(scope, body, failing)

    async def mix(self, scope, body):
        encoded = any(name == b"content-encoding" for name, _ in scope["headers"])
        batch = msgpack.unpackb(zlib.decompress(body) if encoded else body)
        middle = len(batch["payloads"]) // 2
        several = [packed(batch, middle, None), packed(batch, 0, middle)] if middle else []
        earlier.append(packed(batch, 0, None))
        for one in [*several, chance.choice(earlier[-20:])]:
            await self.ask(scope, one, None)

    async def ask(self, scope, body, send):
        told = False

        async def receive():
            nonlocal told
            if told:
                await asyncio.Event().wait()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def nowhere(message):
            pass

        if send is None:
            plain = [(n, v) for n, v in scope["headers"] if n not in (b"content-encoding", b"content-length")]
            scope = {**scope, "headers": [*plain, (b"content-length", str(len(body)).encode())], "state": {}}
        await self.app(scope, receive, send or nowhere)


penstock.api.server.create_app = lambda *args, **details: Storm(made(*args, **details))
main()
"""
"""Takes the arguments of ``penstock``; of what drivers send it fails some 15 %, and repeats and shuffles 22 %."""

__all__ = ["DRIVER", "SERVER"]
