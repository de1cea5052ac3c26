"""Starting, draining, dying: nothing is left behind, whatever ends it."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import httpx2
import pytest

from tests.e2e.site import Site, chat, wait_until


@pytest.fixture
def site() -> Iterator[Site]:
    """A site of its own."""
    with Site() as running:
        yield running


def nothing_is_left(site: Site) -> None:
    """No process, no run directory, no port."""
    assert site.processes() == []
    assert not (site.home / "run").exists()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{site.url}/v1/models")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_running_streams_finish_and_takes_no_new_ones(site: Site, number: signal.Signals) -> None:
    assert site.process is not None
    with (
        site.client() as client,
        client.stream("POST", "/v1/chat/completions", json=chat("slow:300", stream=True)) as r,
    ):
        pieces = r.iter_raw()
        got = next(pieces)
        site.process.send_signal(number)
        wait_until(lambda: _refused(site), "new requests to be refused")
        got += b"".join(pieces)
    assert got.endswith(b"data: [DONE]\n\n")
    assert site.process.wait(10) == 0
    nothing_is_left(site)
    kinds = [record["kind"] for record in site.records()]
    assert kinds[-2:] == ["gateway.stop", "log.stop"]


def _refused(site: Site) -> bool:
    try:
        return httpx2.get(f"{site.url}/v1/models", timeout=2).status_code == 503
    except httpx2.TransportError:
        return True


def test_a_second_signal_does_not_wait_for_streams(site: Site) -> None:
    assert site.process is not None
    with (
        site.client() as client,
        client.stream("POST", "/v1/chat/completions", json=chat("slow:9000", stream=True)) as r,
    ):
        pieces = r.iter_raw()
        assert next(pieces)
        site.process.terminate()
        wait_until(lambda: _refused(site), "the drain")
        began = time.monotonic()
        site.process.terminate()
        assert site.process.wait(15) == 0
        assert time.monotonic() - began < 10
    nothing_is_left(site)


def test_after_kill_9_nothing_survives_and_the_next_start_cleans_up(site: Site) -> None:
    with site.client() as client:
        assert client.post("/v1/chat/completions", json=chat()).status_code == 200
    site.kill()
    wait_until(lambda: not site.processes(), "the children's end", 10)
    assert (site.home / "run").exists()
    site.start()
    with site.client() as client:
        assert client.post("/v1/chat/completions", json=chat()).status_code == 200
    assert site.cloister("audit", "verify", "--json").returncode == 0
    assert site.stop() == 0
    nothing_is_left(site)


def test_a_worker_that_dies_is_replaced(site: Site) -> None:
    worker = site.child("gateway.commands.worker")
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: _serves(site), "a new worker")
    assert site.child("gateway.commands.worker") != worker


def _serves(site: Site) -> bool:
    try:
        with site.client() as client:
            return client.post("/v1/chat/completions", json=chat()).status_code == 200
    except httpx2.TransportError:
        return False


def test_a_second_start_in_the_same_home_is_refused(site: Site) -> None:
    second = site.launch()
    assert second.wait(20) == 3
    assert "already" in site.log()
    with site.client() as client:
        assert client.post("/v1/chat/completions", json=chat()).status_code == 200


def test_a_port_in_use_is_named_with_the_setting_to_change(site: Site) -> None:
    site.home = site.base / "other"
    second = site.cloister("serve")
    assert second.returncode == 3
    assert str(site.port) in second.stderr
    assert "listen" in second.stderr
    assert "Traceback" not in second.stderr
    site.home = site.base / "home"


def test_while_no_engine_is_ready_there_is_503_with_retry_after(site: Site) -> None:
    site.engine.__exit__()
    with site.client() as client:
        refused = client.post("/v1/chat/completions", json=chat())
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "service_unavailable")
        assert refused.headers["retry-after"]
    assert httpx2.get(f"{site.ops_url}/readyz").json()["reasons"] == ["no_engine_ready"]
    assert httpx2.get(f"{site.ops_url}/livez").status_code == 200


def test_starting_and_stopping_at_once_leaves_nothing(site: Site) -> None:
    assert site.stop() == 0
    for delay_s in (0.05, 0.3, 0.7, 1.2):
        process = site.launch()
        timer = threading.Timer(delay_s, process.terminate)
        timer.start()
        assert process.wait(20) in {0, -signal.SIGTERM}
        timer.join()
        wait_until(lambda: not site.processes(), "the children's end", 10)
