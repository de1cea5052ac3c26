"""Identity: the presented credential becomes a principal, or the request ends in 401 before its body is read."""

from gateway import errors
from gateway.errors import Refusal
from gateway.guard.exchange import Exchange
from gateway.identity.credentials import CredentialError
from gateway.identity.keyring import IdentityUnavailable, KeyRing, UnknownKey


async def identify(exchange: Exchange, ring: KeyRing) -> None:
    """Set the principal; raises the 401 Refusal, or a 503 one when the store cannot be read."""
    token = exchange.token
    exchange.token = None
    if token is None:
        raise errors.unauthenticated("missing_api_key", "Send the API key as 'Authorization: Bearer KEY'.")
    try:
        try:
            exchange.principal = ring.authenticate(token)
        except UnknownKey:
            exchange.principal = await ring.fetch(token)
    except CredentialError as error:
        raise refusal(error) from None
    except IdentityUnavailable:
        raise errors.unavailable("identity_unavailable", "Keys cannot be checked now. Try again shortly.", 2) from None


def refusal(error: CredentialError) -> Refusal:
    """The same answer for every wrong credential; the reason is for the log and the metrics only."""
    refused = errors.unauthenticated()
    refused.detail = error.reason
    return refused
