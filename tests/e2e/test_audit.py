"""The audit log from outside: one begin and one end for every outcome, no service without it, changes are found."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.site import Site, chat, wait_until


@pytest.fixture
def site() -> Iterator[Site]:
    """A site of its own: these tests break it."""
    with Site() as running:
        yield running


def test_every_outcome_has_its_records(site: Site) -> None:
    with site.client() as client:
        client.post("/v1/chat/completions", json=chat())
        client.post("/v1/chat/completions", json=chat("status:400"))
        client.post("/v1/chat/completions", json=chat("garbage"))
        client.post("/v1/chat/completions", json=chat(model="none"))
        client.post("/v1/chat/completions", json=chat(cache_salt="x"))
        client.get("/v1/models")
    begun = [record["request"] for record in site.records("req.begin")]
    ended = {record["request"]: record["outcome"] for record in site.records("req.end")}
    assert len(begun) == len(set(begun)) == 3
    assert [ended[request] for request in begun] == ["ok", "engine_refused", "engine_failed"]
    assert [record["reason"] for record in site.records("req.refused")] == ["model_not_found", "field_not_allowed"]
    assert len(site.records("req.served")) == 1
    first = site.records("req.begin")[0]
    assert (first["tenant"], first["model"]["requested"], first["source"]) == ("t", "fake", "127.0.0.1")


def test_without_an_auditor_there_is_no_service_and_then_there_is_again(site: Site) -> None:
    with site.client() as client:
        assert client.post("/v1/chat/completions", json=chat()).status_code == 200
        auditor = site.child("gateway.audit.process")
        os.kill(auditor, signal.SIGSTOP)
        refused = client.post("/v1/chat/completions", json=chat())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "audit_unavailable")
        assert refused.headers["retry-after"]
        seen = len(site.engine.seen)
        os.kill(auditor, signal.SIGKILL)
        wait_until(lambda: client.post("/v1/chat/completions", json=chat()).status_code == 200, "a new auditor")
        assert len(site.engine.seen) == seen + 1
    assert site.cloister("audit", "verify", "--json").returncode == 0


def test_a_stream_whose_end_cannot_be_recorded_has_no_clean_end(site: Site) -> None:
    with (
        site.client() as client,
        client.stream("POST", "/v1/chat/completions", json=chat("slow:100", stream=True)) as r,
    ):
        pieces = r.iter_raw()
        got = next(pieces)
        os.kill(site.child("gateway.audit.process"), signal.SIGSTOP)
        try:
            for piece in pieces:
                got += piece
        except Exception as error:
            assert "Protocol" in type(error).__name__
    os.kill(site.child("gateway.audit.process"), signal.SIGCONT)
    assert b"[DONE]" not in got
    assert b"audit_unavailable" in got


def test_a_begin_without_an_end_is_recorded_as_aborted_after_a_restart(site: Site) -> None:
    with (
        site.client() as client,
        client.stream("POST", "/v1/chat/completions", json=chat("slow:300", stream=True)) as r,
    ):
        request = r.headers["x-request-id"]
        pieces = r.iter_raw()
        assert next(pieces)
        site.kill()
    wait_until(lambda: not site.processes(), "the children's end")
    site.start()
    assert request in [record["request"] for record in site.records("req.aborted")]


def verify(site: Site, directory: Path, *options: str) -> tuple[int, dict[str, object]]:
    """`cloister audit verify --json` on a directory, without a configuration."""
    result = site.cloister("audit", "verify", str(directory), "--json", *options, config=False)
    return result.returncode, json.loads(result.stdout)


def test_verify_finds_what_was_changed_removed_or_put_in_another_order(site: Site, tmp_path: Path) -> None:
    with site.client() as client:
        for _ in range(5):
            client.post("/v1/chat/completions", json=chat())
    assert site.stop() == 0
    audit = site.home / "audit"
    code, answer = verify(site, audit)
    assert (code, answer["ok"], answer["trust"]) == (0, True, "pinned")
    segment = next(audit.glob("records-*.jsonl")).name
    lines = (audit / segment).read_bytes().splitlines(keepends=True)
    changes = {
        "changed": [line.replace(b'"tenant":"t"', b'"tenant":"u"') for line in lines],
        "removed": lines[:4] + lines[5:],
        "reordered": [*lines[:4], lines[5], lines[4], *lines[6:]],
        "cut": lines[:-1],
        "added": [*lines, lines[-1]],
    }
    for name, content in changes.items():
        copy = tmp_path / name
        shutil.copytree(audit, copy)
        (copy / segment).write_bytes(b"".join(content))
        code, answer = verify(site, copy)
        assert (code, answer["ok"]) == (1, False), name
        assert answer["problems"], name
    whole = tmp_path / "whole"
    shutil.copytree(audit, whole)
    code, answer = verify(site, whole, "--log-key", str(audit / "log.vkey"))
    assert (code, answer["ok"]) == (0, True)


def test_verify_works_on_a_live_log(site: Site) -> None:
    with site.client() as client:
        for _ in range(3):
            client.post("/v1/chat/completions", json=chat())
            assert site.cloister("audit", "verify", "--json").returncode == 0


def test_a_damaged_log_refuses_to_start_and_says_so(site: Site) -> None:
    with site.client() as client:
        client.post("/v1/chat/completions", json=chat())
    assert site.stop() == 0
    segment = next((site.home / "audit").glob("records-*.jsonl"))
    segment.write_bytes(segment.read_bytes().replace(b'"tenant":"t"', b'"tenant":"u"', 1))
    process = site.launch()
    assert process.wait(30) == 3
    assert "cloister audit verify" in site.log()
    assert "Traceback" not in site.log()
