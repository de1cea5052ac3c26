"""Bad input, over a raw socket: the right 4xx in the right shape, a line in the log, never a 500, never a secret."""

import json
from collections.abc import Iterator

import httpx2
import pytest

from tests.e2e.site import Site, chat, raw, wait_until

SECRET = "SECRET-PROMPT-7f3a"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """A site with small bounds."""
    bounds = "max_body_bytes = 65536\nrequest_deadline_s = 2\nmax_header_count = 50\nmax_header_bytes = 8192"
    with Site(server=bounds) as running:
        yield running


def request(
    site: Site,
    body: bytes = b"",
    *,
    line: bytes = b"POST /v1/chat/completions HTTP/1.1",
    headers: tuple[bytes, ...] = (),
    drop: tuple[bytes, ...] = (),
) -> bytes:
    """A request that is well-formed but for what the test changes."""
    fields = {
        b"host": b"x",
        b"authorization": b"Bearer " + site.key.encode(),
        b"content-type": b"application/json",
        b"content-length": str(len(body)).encode(),
    }
    lines = [line, *(name + b": " + value for name, value in fields.items() if name not in drop), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def dumped(**fields: object) -> bytes:
    """A chat body with a planted secret."""
    return json.dumps({**chat(SECRET), **fields}).encode()


GOOD = dumped()
DEEP = b'{"model": "fake", "messages": ' + b"[" * 200 + b"]" * 200 + b"}"
VERY_DEEP = b'{"model": "fake", "x": ' + b"[" * 30000 + b"]" * 30000 + b"}"
POST = b"POST /v1/chat/completions HTTP/1.1"

BODIES = {
    "not json": (b"{" + SECRET.encode(), 400, "invalid_json"),
    "empty": (b"", 400, "invalid_json"),
    "not an object": (b"[1]", 400, "invalid_json"),
    "trailing data": (GOOD + b" {}", 400, "invalid_json"),
    "duplicate key": (b'{"model": "fake", "model": "other", "messages": []}', 400, "invalid_json"),
    "duplicate key inside": (
        b'{"model": "fake", "messages": [{"role": "a", "role": "b"}]}',
        400,
        "invalid_json",
    ),
    "NaN": (b'{"model": "fake", "temperature": NaN}', 400, "invalid_json"),
    "Infinity": (b'{"model": "fake", "temperature": -Infinity}', 400, "invalid_json"),
    "number overflow": (b'{"model": "fake", "temperature": 1e999}', 400, "invalid_json"),
    "integer beyond 64 bits": (b'{"model": "fake", "seed": 99999999999999999999}', 400, "invalid_json"),
    "integer of 5000 digits": (b'{"model": "fake", "seed": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
    "too deep": (DEEP, 400, "invalid_json"),
    "much too deep": (VERY_DEEP, 400, "invalid_json"),
    "not utf-8": (b'{"model": "fake\xff"}', 400, "invalid_json"),
    "utf-16": ('{"model": "fake"}'.encode("utf-16"), 400, "invalid_json"),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, 400, "invalid_json"),
    "raw control character": (b'{"model": "fa\x01ke"}', 400, "invalid_json"),
    "lone surrogate": (b'{"model": "fake", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, "invalid_json"),
    "lone surrogate in the model": (b'{"model": "fa\\ud800ke", "messages": []}', 404, "model_not_found"),
    "model is a number": (b'{"model": 5}', 400, "invalid_field"),
    "stream is text": (dumped(stream="yes"), 400, "invalid_field"),
    "stream_options is a list": (dumped(stream=True, stream_options=[1]), 400, "invalid_field"),
    "n is huge": (dumped(n=10**9), 400, "invalid_field"),
    "unknown model": (dumped(model="gpt-4"), 404, "model_not_found"),
    "model in Cyrillic letters": (dumped(model="f\u0430ke"), 404, "model_not_found"),
    "model with a zero-width space": (dumped(model="fake\u200b"), 404, "model_not_found"),
    "model with a trailing space": (dumped(model="fake "), 404, "model_not_found"),
    "model in capitals": (dumped(model="FAKE"), 404, "model_not_found"),
    "model with a NUL": (dumped(model="fake\x00"), 404, "model_not_found"),
    "cache_salt": (dumped(cache_salt="mine"), 400, "field_not_allowed"),
    "kv_transfer_params": (dumped(kv_transfer_params={"x": 1}), 400, "field_not_allowed"),
    "chat_template": (dumped(chat_template="{{x}}"), 400, "field_not_allowed"),
    "priority": (dumped(priority=1), 400, "field_not_allowed"),
    "image by url": (
        dumped(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]),
        400,
        "remote_media",
    ),
    "image by escaped url": (
        b'{"model": "fake", "messages": [{"role": "user", "content": [{"type": "image_url", '
        b'"image_\\u0075rl": {"\\u0075rl": "file:///etc/passwd"}}]}]}',
        400,
        "remote_media",
    ),
    "larger than the bound": (dumped(user="x" * 70000), 413, "body_too_large"),
}

HEADS = {
    "two content-length": ({"headers": (b"content-length: 5",)}, 400),
    "content-length and transfer-encoding": ({"headers": (b"transfer-encoding: chunked",)}, 400),
    "transfer-encoding gzip": ({"headers": (b"transfer-encoding: gzip",), "drop": (b"content-length",)}, 400),
    "negative content-length": ({"headers": (b"content-length: -5",), "drop": (b"content-length",)}, 400),
    "content-length in words": ({"headers": (b"content-length: five",), "drop": (b"content-length",)}, 400),
    "two authorization": ({"headers": (b"authorization: Bearer other",)}, 400),
    "underscore header": ({"headers": (b"content_length: 5",)}, 400),
    "space before the colon": ({"headers": (b"x-a : b",)}, 400),
    "folded header": ({"headers": (b"x-a: b\r\n c",)}, 400),
    "header with NUL": ({"headers": (b"x-a: b\x00c",)}, 400),
    "too many headers": ({"headers": tuple(b"x-%d: y" % n for n in range(60))}, 431),
    "header too large": ({"headers": (b"x-a: " + b"y" * 9000,)}, 431),
    "url too large": ({"line": b"POST /" + b"a" * 9000 + b" HTTP/1.1"}, 431),
    "content-encoding": ({"headers": (b"content-encoding: gzip",)}, 400),
    "content-type text": ({"headers": (b"content-type: text/plain",), "drop": (b"content-type",)}, 400),
    "no content-type": ({"drop": (b"content-type",)}, 400),
    "key in the query": ({"line": b"POST /v1/chat/completions?api_key=%b HTTP/1.1" % SECRET.encode()}, 400),
    "escaped dots": ({"line": b"POST /v1/%2e%2e/admin HTTP/1.1"}, 404),
    "plain dots": ({"line": b"POST /v1/../v1/chat/completions HTTP/1.1"}, 404),
    "escaped letter": ({"line": b"POST /v1/chat/%63ompletions HTTP/1.1"}, 404),
    "doubled slash": ({"line": b"POST //v1/chat/completions HTTP/1.1"}, 404),
    "trailing slash": ({"line": b"POST /v1/chat/completions/ HTTP/1.1"}, 404),
    "other path": ({"line": b"POST /invocations HTTP/1.1"}, 404),
    "wrong method": ({"line": b"DELETE /v1/chat/completions HTTP/1.1"}, 405),
    "unknown method": ({"line": b"BREW /v1/chat/completions HTTP/1.1"}, 400),
    "no version": ({"line": b"POST /v1/chat/completions"}, 400),
    "version 3": ({"line": b"POST /v1/chat/completions HTTP/3.7"}, 400),
    "no key": ({"drop": (b"authorization",)}, 401),
    "basic authorization": ({"headers": (b"authorization: Basic eDp5",), "drop": (b"authorization",)}, 401),
    "key with a wrong checksum": (
        {"headers": (b"authorization: Bearer clo_live_AAAAAAAAAA_" + b"a" * 49,), "drop": (b"authorization",)},
        401,
    ),
    "key not ascii": ({"headers": (b"authorization: Bearer \xc3\xa9",), "drop": (b"authorization",)}, 401),
    "key of 5000 bytes": ({"headers": (b"authorization: Bearer " + b"k" * 5000,), "drop": (b"authorization",)}, 401),
}


def parse(answer: bytes) -> tuple[int, dict[str, str], dict[str, object]]:
    """Status, headers and JSON body of one answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(status.split(" ")[1]), headers, json.loads(body[: int(headers["content-length"])])


def check_shape(headers: dict[str, str], document: dict[str, object]) -> str:
    """The error is OpenAI's shape and holds no secret; returns its code."""
    error = document["error"]
    assert isinstance(error, dict)
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert SECRET not in json.dumps(document)
    assert headers["x-request-id"].startswith("req-")
    assert headers["content-type"] == "application/json"
    return str(error["code"])


@pytest.mark.parametrize("name", BODIES)
def test_a_bad_body_is_refused_with_its_reason(site: Site, name: str) -> None:
    body, status, code = BODIES[name]
    seen = len(site.engine.seen)
    got, headers, document = parse(raw(site.port, request(site, body)))
    assert (got, check_shape(headers, document)) == (status, code)
    assert len(site.engine.seen) == seen  # nothing of it has reached the engine
    assert headers["x-request-id"] in site.log()


@pytest.mark.parametrize("name", HEADS)
def test_a_bad_head_is_refused(site: Site, name: str) -> None:
    change, status = HEADS[name]
    seen = len(site.engine.seen)
    answer = raw(site.port, request(site, GOOD, **change))  # type: ignore[arg-type]
    got, headers, document = parse(answer)
    assert got == status
    check_shape(headers, document)
    assert len(site.engine.seen) == seen
    assert headers["x-request-id"] in site.log()


def test_a_smuggled_second_request_is_never_executed(site: Site) -> None:
    inner = request(site, json.dumps(chat("smuggled")).encode())
    outer = request(site, b"0\r\n\r\n" + inner, headers=(b"transfer-encoding: chunked",))
    raw(site.port, outer)
    assert not [document for _, _, document in site.engine.seen if "smuggled" in json.dumps(document)]


def test_a_chunked_body_without_length_is_served(site: Site) -> None:
    body = json.dumps(chat()).encode()
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    head = request(site, headers=(b"transfer-encoding: chunked",), drop=(b"content-length",))
    assert raw(site.port, head + chunks).startswith(b"HTTP/1.1 200")


def test_a_bad_chunk_size_is_refused(site: Site) -> None:
    head = request(site, headers=(b"transfer-encoding: chunked",), drop=(b"content-length",))
    assert raw(site.port, head + b"zz\r\n{}\r\n0\r\n\r\n").startswith(b"HTTP/1.1 400")


def test_a_body_larger_than_declared_bound_ends_the_connection_after_413(site: Site) -> None:
    head = request(site, headers=(b"content-length: 10000000",), drop=(b"content-length",))
    answer = raw(site.port, head + b"x" * 100000)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in answer.lower()


def test_slow_headers_end_at_the_deadline(site: Site) -> None:
    answer = raw(site.port, b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n", patience_s=6)
    assert answer.startswith(b"HTTP/1.1 408")


def test_a_slow_body_ends_at_the_deadline(site: Site) -> None:
    answer = raw(site.port, request(site, GOOD)[:-5], patience_s=6)
    assert answer.startswith(b"HTTP/1.1 408")


def test_a_silent_connection_is_closed_at_the_deadline(site: Site) -> None:
    assert raw(site.port, b"", patience_s=6) == b""


def test_errors_on_messages_have_the_shape_of_anthropic(site: Site) -> None:
    with site.client() as client:
        refused = client.post("/v1/messages", content=b"{", headers={"content-type": "application/json"})
    assert refused.status_code == 400
    assert refused.json()["type"] == "error"
    assert refused.json()["error"]["type"] == "invalid_request_error"
    assert refused.json()["request_id"] == refused.headers["x-request-id"]


def test_refusals_keep_a_well_framed_connection_open(site: Site) -> None:
    with site.client() as client:
        assert client.post("/v1/chat/completions", json=chat(cache_salt="x")).status_code == 400
        assert client.post("/v1/chat/completions", json=chat()).status_code == 200


def test_an_anonymous_flood_is_recorded_in_aggregate(site: Site) -> None:
    before = len(site.records("req.refused"))
    with httpx2.Client(base_url=site.url) as client:
        for _ in range(200):
            assert client.post("/v1/chat/completions", json=chat()).status_code == 401

    def counted() -> int:
        found = [item for record in site.records("refused.aggregate") for item in record["refusals"]]
        return sum(item["count"] for item in found if item["reason"] == "missing_api_key")

    wait_until(lambda: counted() >= 200, "the aggregate record")
    assert len(site.records("req.refused")) == before
    assert len(site.records("refused.aggregate")) < 100


def test_after_all_of_it_nothing_broke_and_no_secret_is_anywhere(site: Site) -> None:
    with site.client() as client:
        assert client.post("/v1/chat/completions", json=chat()).status_code == 200
    log = site.log()
    assert "Traceback" not in log
    assert '"event": "bug"' not in log
    assert SECRET not in log
    assert site.key not in log
    for file in site.home.rglob("*"):
        if file.is_file():
            assert SECRET.encode() not in file.read_bytes(), file
    assert site.metric('cloister_refusals_total{reason="our_bug"') == 0
    assert site.cloister("audit", "verify", "--json").returncode == 0
