"""What passes through: paths, bodies, streams byte for byte, usage, headers, and what the engine gets to see."""

import json
from typing import Any

import pytest

from tests.e2e.site import Site, chat, raw, wait_until

STREAMS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": chat("words:4", stream=True),
    "/v1/completions": {"model": "fake", "prompt": "words:4", "stream": True},
    "/v1/messages": {"model": "fake", "messages": [{"role": "user", "content": "words:4"}], "stream": True},
    "/v1/responses": {"model": "fake", "input": "words:4", "stream": True},
}
PLAIN = {
    "/v1/chat/completions": "/v1/chat/completions",
    "/v1/completions": "/v1/completions",
    "/v1/embeddings": "/v1/embeddings",
    "/v1/responses": "/v1/responses",
    "/v1/messages": "/v1/messages",
    "/v1/messages/count_tokens": "/v1/messages/count_tokens",
    "/v1/rerank": "/v1/rerank",
    "/rerank": "/v1/rerank",
    "/v1/score": "/v1/score",
    "/score": "/v1/score",
    "/v1/tokenize": "/tokenize",
    "/tokenize": "/tokenize",
    "/v1/detokenize": "/detokenize",
    "/detokenize": "/detokenize",
}


def sent_by_engine(site: Site, before: int, what: bytes) -> bytes:
    """What the engine has sent since `before`, once its end is there."""
    wait_until(lambda: what in b"".join(site.engine.sent[before:]), "the engine's last event")
    return b"".join(site.engine.sent[before:])


@pytest.mark.parametrize("path", PLAIN)
def test_each_path_reaches_the_engine_and_comes_back_unchanged(either: Site, path: str) -> None:
    body = {"model": "fake", "messages": [{"role": "user", "content": "words:3"}], "unknown_field": {"kept": [1, 2.5]}}
    with either.client() as client:
        answer = client.post(path, json=body)
    engine_path, headers, document = either.engine.seen[-1]
    assert answer.status_code == 200, answer.text
    assert engine_path == PLAIN[path]
    assert document["unknown_field"] == {"kept": [1, 2.5]}
    assert "authorization" not in headers
    assert headers["x-request-id"] == answer.headers["x-request-id"]
    assert answer.headers["x-audit-receipt"].startswith("clo-")


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize("usage", [True, False])
def test_a_stream_is_the_engines_own_bytes(either: Site, path: str, usage: bool) -> None:
    body = dict(STREAMS[path])
    openai = path.endswith("completions")
    if openai and usage:
        body["stream_options"] = {"include_usage": True}
    before = len(either.engine.sent)
    with either.streaming(body, path) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        got = b"".join(answer.iter_raw())
    end = b"[DONE]" if openai else b"message_stop" if path == "/v1/messages" else b"response.completed"
    sent = sent_by_engine(either, before, end)
    if openai and not usage:
        assert b'"usage"' in sent  # asked for by the gateway, for the record
        events = [event for event in sent.split(b"\n\n") if event and b'"choices": []' not in event]
        sent = b"".join(event + b"\n\n" for event in events)
    assert got == sent
    record = either.records("req.end")[-1]
    assert (record["outcome"], record["usage"]["input"], record["usage"]["output"]) == ("ok", 7, 5)


def test_the_terminal_event_comes_after_its_record(site: Site) -> None:
    with (
        site.client() as client,
        client.stream("POST", "/v1/chat/completions", json=STREAMS["/v1/chat/completions"]) as r,
    ):
        request_id = r.headers["x-request-id"]
        for line in r.iter_lines():
            if line == "data: [DONE]":
                ended = [record["request"] for record in site.records("req.end")]
                assert request_id in ended
                return
    raise AssertionError("no terminal event")


def test_an_engine_error_passes_through_unchanged(site: Site) -> None:
    with site.client() as client:
        answer = client.post("/v1/chat/completions", json=chat("status:422"))
    assert answer.status_code == 422
    assert answer.json()["error"]["message"] == "refused by the engine"
    assert site.records("req.end")[-1]["outcome"] == "engine_refused"


@pytest.mark.parametrize("status", ["401", "403"])
def test_the_engines_own_401_is_not_the_clients_fault(site: Site, status: str) -> None:
    with site.client() as client:
        answer = client.post("/v1/chat/completions", json=chat(f"status:{status}"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_misconfigured")
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("script", ["garbage", "break", "headers:100000", "headers:10000000"])
def test_a_hostile_or_dying_engine_gives_502_or_a_visible_break(either: Site, script: str) -> None:
    with either.client() as client:
        try:
            answer = client.post("/v1/chat/completions", json=chat(script))
            assert answer.status_code == 502
            assert answer.json()["error"]["type"] == "engine_error"
        except Exception as error:
            assert script == "break", error  # its headers were out already: the body ends short
        assert client.post("/v1/chat/completions", json=chat()).status_code == 200
    outcomes = {record["outcome"] for record in either.records("req.end")}
    assert "engine_failed" in outcomes


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize("script", ["die:3", "end:3"])
def test_an_engine_that_dies_in_a_stream_is_never_a_clean_end(site: Site, path: str, script: str) -> None:
    body = json.loads(json.dumps(STREAMS[path]).replace("words:4", script))
    with site.streaming(body, path) as answer:
        try:
            got = b"".join(answer.iter_raw())
        except Exception:
            got = b""
    assert b"[DONE]" not in got
    assert b"message_stop" not in got
    assert b"response.completed" not in got
    assert site.records("req.end")[-1]["outcome"] == "engine_failed"


def test_the_error_event_in_a_broken_stream_has_the_apis_form(site: Site) -> None:
    marks = {
        "/v1/chat/completions": 'data: {"error"',
        "/v1/messages": "event: error",
        "/v1/responses": "event: response.failed",
    }
    for path, mark in marks.items():
        body = json.loads(json.dumps(STREAMS[path]).replace("words:4", "die:3"))
        got = b""
        with site.streaming(body, path) as answer:
            try:
                for piece in answer.iter_raw():
                    got += piece
            except Exception as error:
                assert "RemoteProtocolError" in type(error).__name__
        assert mark in got.decode(), path


def test_what_steers_the_engine_is_set_by_the_gateway(site: Site) -> None:
    with site.client() as client:
        client.post("/v1/chat/completions", json=chat())
        client.post("/v1/responses", json={"model": "fake", "input": "words:3"})
    chats, responses = site.engine.seen[-2][2], site.engine.seen[-1][2]
    assert len(chats["cache_salt"]) == 64
    assert responses["store"] is False
    assert responses["cache_salt"] == chats["cache_salt"]


def test_tenants_never_share_a_prefix_cache(site: Site) -> None:
    other = site.cloister("key", "create", "--tenant", "elsewhere", "--name", "n", "--quiet").stdout.strip()
    salts = set()
    for key in (site.key, other):
        with site.client(key) as client:
            assert client.post("/v1/chat/completions", json=chat()).status_code == 200
        salts.add(site.engine.seen[-1][2]["cache_salt"])
    assert len(salts) == 2


@pytest.mark.parametrize("field", ["previous_response_id", "conversation", "background"])
def test_responses_are_never_stored(site: Site, field: str) -> None:
    with site.client() as client:
        answer = client.post("/v1/responses", json={"model": "fake", "input": "words:3", field: "x"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


def test_models_are_listed_as_the_key_may_see_them(site: Site) -> None:
    narrow = site.create_key("narrow", "--models", "other")
    with site.client() as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["fake", "other"]
        assert client.get("/v1/models/fake").json()["id"] == "fake"
        assert client.get("/v1/models/none").status_code == 404
    with site.client(narrow) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["other"]
        assert client.get("/v1/models/fake").status_code == 404
        assert client.post("/v1/chat/completions", json=chat()).status_code == 404


def test_a_large_body_in_small_pieces_arrives_whole(site: Site) -> None:
    body = json.dumps(chat("words:3", user="x" * 3_000_000)).encode()
    pieces = (body[n : n + 7001] for n in range(0, len(body), 7001))
    with site.client() as client:
        answer = client.post("/v1/chat/completions", content=pieces, headers={"content-type": "application/json"})
    assert answer.status_code == 200
    assert len(site.engine.seen[-1][2]["user"]) == 3_000_000


def test_requests_may_wait_behind_each_other_on_one_connection(site: Site) -> None:
    body = json.dumps(chat("slow:20")).encode()
    one = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (site.key.encode(), len(body), body)
    )
    assert raw(site.port, one * 3).count(b"HTTP/1.1 200") == 3


def test_expect_100_continue_is_answered(site: Site) -> None:
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\nexpect: 100-continue\r\n"
        b"content-type: application/json\r\ncontent-length: 20\r\n\r\n" % site.key.encode()
    )
    assert raw(site.port, head).startswith(b"HTTP/1.1 100 Continue")
