"""Front, second half: the ASGI stage that decides whether a request may be looked at at all.

Deny by default on the raw path; ambiguous framing and ambiguous credentials are refused, not interpreted.
Sources: RFC 9112 section 6.3 (message length), RFC 6750 section 2.3 (no credentials in the query).
"""

from gateway import errors
from gateway.errors import Refusal
from gateway.guard import routes
from gateway.guard.exchange import Exchange

_SINGLE = frozenset({b"authorization", b"x-api-key", b"content-length", b"content-type", b"transfer-encoding", b"host"})
_CREDENTIAL_PARAMETERS = (b"key=", b"token=", b"secret=", b"password=", b"authorization=")
MAX_CREDENTIAL_BYTES = 4096


def admit(exchange: Exchange) -> None:
    """Set the operation and the presented credential, or raise a Refusal."""
    route = routes.find(exchange.path)
    if route is None:
        raise errors.unknown_route()
    exchange.operation = route.operation
    if exchange.method != route.method:
        raise errors.wrong_method(route.method)
    query = exchange.scope["query_string"]
    if query and any(parameter in query.lower() for parameter in _CREDENTIAL_PARAMETERS):
        raise errors.bad_request(
            "credential_in_query", "Send the API key in the Authorization header, never in the URL."
        )
    exchange.token = _headers(exchange)


def _headers(exchange: Exchange) -> str | None:
    """Check the header fields and return the presented credential."""
    seen: dict[bytes, bytes] = {}
    for name, value in exchange.scope["headers"]:
        if name in _SINGLE:
            if name in seen:
                raise _ambiguous(name)
            seen[name] = value
        elif b"_" in name:
            raise errors.bad_request("underscore_header", "Header names with an underscore are refused. Use a hyphen.")
        elif name == b"content-encoding" and value.lower() != b"identity":
            raise errors.bad_request("content_encoding", "Send the body without Content-Encoding.")
    if b"transfer-encoding" in seen and b"content-length" in seen:
        raise _ambiguous(b"transfer-encoding")
    if exchange.method == "POST":
        media_type = seen.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if media_type != b"application/json":
            raise errors.bad_request("content_type", "Send the body with 'Content-Type: application/json'.")
    return _credential(exchange, seen)


def _credential(exchange: Exchange, seen: dict[bytes, bytes]) -> str | None:
    authorization = seen.get(b"authorization")
    api_key = seen.get(b"x-api-key")
    if authorization is not None:
        scheme, _, credential = authorization.partition(b" ")
        if scheme.lower() != b"bearer":
            raise errors.unauthenticated("unknown_scheme", "Send the API key as 'Authorization: Bearer KEY'.")
        credential = credential.strip()
        if api_key is not None and exchange.dialect == "anthropic" and api_key != credential:
            raise errors.bad_request("two_credentials", "Send one credential, not two different ones.")
    elif api_key is not None and exchange.dialect == "anthropic":
        credential = api_key
    else:
        return None
    if len(credential) > MAX_CREDENTIAL_BYTES or not credential.isascii():
        raise errors.unauthenticated()
    return credential.decode("ascii")


def _ambiguous(name: bytes) -> Refusal:
    return errors.bad_request(
        "ambiguous_header", f"The {name.decode()} header is sent more than once or contradicts another."
    )
