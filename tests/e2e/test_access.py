"""Keys: usable from the moment they are made, refused within a second of their end, on every worker."""

import json
import time
from collections.abc import Iterator

import pytest

from tests.e2e.site import Site, chat, wait_until


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """Two workers behind one port."""
    with Site(workers=2) as running:
        yield running


def ask(site: Site, key: str, **fields: object) -> int:
    """The status of one request on a connection of its own, so that any worker may get it."""
    with site.client(key) as client:
        return client.post("/v1/chat/completions", json=chat(**fields)).status_code  # type: ignore[arg-type]


def test_a_new_key_works_at_once_on_every_worker(site: Site) -> None:
    key = site.create_key("new")
    assert [ask(site, key) for _ in range(12)] == [200] * 12


def test_a_revoked_key_is_refused_within_a_second_on_every_worker(site: Site) -> None:
    created = json.loads(site.cloister("key", "create", "--tenant", "t", "--name", "r", "--json").stdout)
    assert [ask(site, created["key"]) for _ in range(8)] == [200] * 8
    assert site.cloister("key", "revoke", created["id"]).returncode == 0
    time.sleep(1.0)  # the promise itself
    assert [ask(site, created["key"]) for _ in range(12)] == [401] * 12


def test_an_expired_key_is_refused(site: Site) -> None:
    key = site.create_key("short", "--expires", "2s")
    assert ask(site, key) == 200
    wait_until(lambda: ask(site, key) == 401, "the expiry", 10)


def test_rotation_ends_the_old_key_and_keeps_the_scopes(site: Site) -> None:
    old = json.loads(
        site.cloister("key", "create", "--tenant", "t", "--name", "x", "--models", "other", "--json").stdout
    )
    new = json.loads(site.cloister("key", "rotate", old["id"], "--json").stdout)
    wait_until(lambda: ask(site, old["key"], model="other") == 401, "the old key's end", 3)
    assert (ask(site, new["key"], model="other"), ask(site, new["key"])) == (200, 404)


def test_scopes_are_enforced(site: Site) -> None:
    key = site.create_key("scoped", "--operations", "chat.completions.create")
    assert ask(site, key) == 200
    with site.client(key) as client:
        refused = client.post("/v1/completions", json={"model": "fake", "prompt": "words:3"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "policy_denied")
    assert refused.json()["error"]["type"] == "permission_error"


def test_a_key_with_one_changed_letter_is_refused(site: Site) -> None:
    key = site.create_key("letters")
    head, secret = key.rsplit("_", 1)
    other = "b" if secret[3] == "a" else "a"
    assert ask(site, f"{head}_{secret[:3]}{other}{secret[4:]}") == 401
    assert ask(site, key) == 200


def test_every_wrong_credential_gets_the_same_answer(site: Site) -> None:
    revoked = json.loads(site.cloister("key", "create", "--tenant", "t", "--name", "r2", "--json").stdout)
    site.cloister("key", "revoke", revoked["id"])
    time.sleep(1.0)
    messages = set()
    for key in (revoked["key"], "clo_live_zzzzzzzzzz_nothing", "sk-openai", revoked["key"][:-1]):
        with site.client(key) as client:
            messages.add(client.post("/v1/chat/completions", json=chat()).json()["error"]["message"])
    assert len(messages) == 1


def test_the_anthropic_header_is_a_credential_on_messages_only(site: Site) -> None:
    key = site.create_key("anthropic")
    with site.client("") as client:
        del client.headers["authorization"]
        body = {"model": "fake", "messages": [{"role": "user", "content": "words:3"}]}
        assert client.post("/v1/messages", json=body, headers={"x-api-key": key}).status_code == 200
        assert client.post("/v1/chat/completions", json=body, headers={"x-api-key": key}).status_code == 401


def test_key_changes_are_recorded_and_hold_no_secret(site: Site) -> None:
    created = json.loads(site.cloister("key", "create", "--tenant", "t", "--name", "rec", "--json").stdout)
    site.cloister("key", "revoke", created["id"])
    wait_until(lambda: created["id"] in [r["key"] for r in site.records("key.revoke")], "the records of the outbox")
    assert created["id"] in [record["key"] for record in site.records("key.create")]
    assert created["key"].rsplit("_", 1)[1][:20] not in json.dumps(site.records())
    assert created["key"].encode() not in (site.home / "state.db").read_bytes()


def test_a_key_made_while_nothing_runs_works_after_the_start(site: Site) -> None:
    assert site.stop() == 0
    key = site.create_key("before")
    site.start()
    assert ask(site, key) == 200


def test_key_commands_say_what_is_wrong(site: Site) -> None:
    unknown = site.cloister("key", "revoke", "nonesuch")
    assert unknown.returncode == 1
    assert "cloister key list" in unknown.stderr
    bad = site.cloister("key", "create", "--tenant", "t", "--name", "n", "--operations", "chat.create")
    assert bad.returncode == 2
    assert "chat.create" in bad.stderr
    assert site.cloister("key", "create", "--tenant", "t", "--name", "n", "--expires", "soon").returncode == 2
