"""Streams under stress: clients that leave, clients that are slow, many at once, many that only sit there."""

import asyncio
import json
import socket
import time
from pathlib import Path

import httpx2

from tests.e2e.site import Site, chat, wait_until

STREAMS = 500
IDLE = 2000


def test_a_client_that_leaves_a_stream_stops_the_engine_within_a_second(either: Site) -> None:
    with (
        either.client() as client,
        client.stream("POST", "/v1/chat/completions", json=chat("slow:200", stream=True)) as r,
    ):
        pieces = r.iter_raw()
        assert next(pieces)
        request = r.headers["x-request-id"]
        assert either.engine.running == 1
    left = time.monotonic()
    wait_until(lambda: either.engine.running == 0, "the engine's stop", 5)
    assert time.monotonic() - left < 1.0
    ended = {record["request"]: record["outcome"] for record in either.records("req.end")}
    assert ended[request] == "disconnected"


def test_a_client_that_leaves_before_the_answer_stops_the_engine_within_a_second(either: Site) -> None:
    body = json.dumps(chat("hang")).encode()
    with socket.create_connection(("127.0.0.1", either.port)) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (either.key.encode(), len(body), body)
        )
        wait_until(lambda: either.engine.running == 1, "the request at the engine")
    left = time.monotonic()
    wait_until(lambda: either.engine.running == 0, "the engine's stop", 5)
    assert time.monotonic() - left < 1.0
    wait_until(lambda: either.records("req.end")[-1]["outcome"] == "disconnected", "the end record")


def test_an_engine_that_is_killed_breaks_what_runs_and_nothing_else(either: Site) -> None:
    with (
        either.client() as client,
        client.stream("POST", "/v1/chat/completions", json=chat("slow:300", stream=True)) as r,
    ):
        pieces = r.iter_raw()
        got = next(pieces)
        either.engine.drop_connections()
        try:
            for piece in pieces:
                got += piece
        except httpx2.TransportError:
            pass
    assert b"engine_failed" in got
    assert b"[DONE]" not in got
    with either.client() as client:
        assert client.post("/v1/chat/completions", json=chat()).status_code == 200


def test_a_client_that_does_not_read_slows_the_engine_down_and_loses_nothing(site: Site) -> None:
    body = json.dumps(chat("words:60000", stream=True)).encode()
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\nconnection: close\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (site.key.encode(), len(body), body)
    )
    before = len(site.engine.sent)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", site.port))
        connection.sendall(head)
        assert connection.recv(1)
        settled = wait_until(lambda: _stands_still(site), "the engine to wait for the client")
        assert settled - before < 60000
        got = b""
        while block := connection.recv(1 << 20):
            got += block
    assert got.count(b'"content": "w') == 60000
    assert b"data: [DONE]" in got


def _stands_still(site: Site) -> int:
    count = len(site.engine.sent)
    time.sleep(0.3)
    return count if len(site.engine.sent) == count else 0


async def _one(client: httpx2.AsyncClient, number: int) -> str:
    async with client.stream("POST", "/v1/chat/completions", json=chat("slow:20", stream=True)) as answer:
        return (await answer.aread()).decode() if answer.status_code == 200 else str(answer.status_code)


async def test_500_streams_at_once_finish_intact(site: Site) -> None:
    limits = httpx2.Limits(max_connections=None)
    headers = {"authorization": f"Bearer {site.key}"}
    async with httpx2.AsyncClient(base_url=site.url, headers=headers, timeout=60, limits=limits) as client:
        answers = await asyncio.gather(*(_one(client, number) for number in range(STREAMS)))
    expected = "".join(
        f'data: {{"id": "c", "choices": [{{"index": 0, "delta": {{"content": "w{n} "}}}}]}}\n\n' for n in range(5)
    )
    assert set(answers) == {f"{expected}data: [DONE]\n\n"}
    wait_until(lambda: site.metric("cloister_streams_in_flight") == 0, "the gauge")


def _memory_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise AssertionError("no Pss")


def _cpu_s(pid: int) -> float:
    return time.clock_gettime(~pid << 3 | 2)


def test_2000_idle_connections_cost_memory_only(site: Site) -> None:
    worker = site.child("gateway.commands.worker")
    get = b"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\n\r\n" % site.key.encode()
    before_kib, connections = _memory_kib(worker), []
    try:
        for _ in range(IDLE):
            connection = socket.create_connection(("127.0.0.1", site.port))
            connections.append(connection)
            connection.sendall(get)
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        began = _cpu_s(worker)
        time.sleep(3)  # the interval that is measured
        assert (_cpu_s(worker) - began) / 3 < 0.02
        assert _memory_kib(worker) - before_kib < 64 * 1024
        with site.client() as client:
            assert client.post("/v1/chat/completions", json=chat()).status_code == 200
        connections[0].sendall(get)
        assert connections[0].recv(4096).startswith(b"HTTP/1.1 200")
    finally:
        for connection in connections:
            connection.close()
