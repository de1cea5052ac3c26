"""One site for all tests that leave it as it was; tests that break things start their own."""

from collections.abc import Iterator

import pytest

from tests.e2e.site import Site


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    """A running site over a unix socket."""
    with Site() as running:
        yield running


@pytest.fixture(scope="session", params=["unix", "tcp"])
def either(request: pytest.FixtureRequest, site: Site) -> Iterator[Site]:
    """The same tests over both kinds of engine connection."""
    if request.param == "unix":
        yield site
        return
    with Site(over="tcp") as running:
        yield running
