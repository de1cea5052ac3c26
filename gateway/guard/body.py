"""Body: read within its bound, parsed once, strictly; what steers the engine is set by us or refused.

Refused: duplicate keys, NaN and Infinity, numbers that overflow, integers beyond 64 bits, nesting deeper
than MAX_DEPTH, text that is not UTF-8. Unknown fields stay. The engine gets the parsed object serialised
anew, so whatever was decided on is what the engine sees. Source: RFC 8259; RFC 7493 (I-JSON) section 2.
"""

import json
import math
from typing import Any, cast

import msgspec

from gateway import errors
from gateway.domain import JsonObject
from gateway.errors import Refusal
from gateway.guard.exchange import Exchange

MAX_DEPTH = 64
MAX_CHOICES = 128
_STEERING = (
    "cache_salt",
    "kv_transfer_params",
    "vllm_xargs",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "chat_template",
    "chat_template_kwargs",
    "priority",
    "data_parallel_rank",
    "request_id",
)
_MEDIA_KEYS = frozenset({"image_url", "audio_url", "video_url", "file_url", "source"})
_OPAQUE_KEYS = frozenset({"tools", "arguments", "response_format", "structured_outputs", "metadata", "functions"})
_WHITESPACE = " \t\n\r"  # RFC 8259 section 2
_ENCODER = msgspec.json.Encoder()
_SALTED = frozenset({"chat.completions.create", "completions.create", "responses.create"})


class _Unacceptable(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> JsonObject:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _Unacceptable("An object has the same key twice.")
    return result


def _constant(name: str) -> float:
    raise _Unacceptable(f"{name} is not JSON.")


def _integer(text: str) -> int:
    if len(text) > 20 or not -(1 << 63) <= (value := int(text)) < 1 << 64:
        raise _Unacceptable("An integer does not fit in 64 bits.")
    return value


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Unacceptable("A number is too large.")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_constant, parse_int=_integer, parse_float=_float, strict=True
)


def parse(raw: bytes) -> JsonObject:
    """Parse one JSON object strictly; raises a 400 Refusal that never repeats the input."""
    try:
        text = raw.decode().strip(_WHITESPACE)
        value, end = _DECODER.raw_decode(text)
    except UnicodeDecodeError:
        raise _bad_json("The body is not UTF-8.") from None
    except _Unacceptable as error:
        raise _bad_json(str(error)) from None
    except json.JSONDecodeError as error:
        raise _bad_json(f"The body is not JSON: {error.msg} at character {error.pos}.") from None
    except RecursionError:
        raise _bad_json("The body is nested too deeply.") from None
    if end != len(text):
        raise _bad_json(f"The body is not JSON: more follows after character {end}.")
    if not isinstance(value, dict):
        raise _bad_json("The body is not a JSON object.")
    return value


def _holds_media(document: JsonObject) -> bool:
    """Whether any key may hold media; raises a 400 Refusal for nesting deeper than MAX_DEPTH."""
    level: list[Any] = [document]
    found = False
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            children = value
            if type(value) is dict:
                children = value.values()
                found = found or not _MEDIA_KEYS.isdisjoint(value)
            inner += [child for child in children if type(child) is dict or type(child) is list]
        if not inner:
            return found
        level = inner
    raise _bad_json(f"The body is nested deeper than {MAX_DEPTH}.")


def _bad_json(message: str) -> Refusal:
    return errors.bad_request("invalid_json", message)


async def read(exchange: Exchange, receive: Any, limit_bytes: int) -> bytes | None:
    """Read the whole body, at most `limit_bytes`; `None` when the client has gone."""
    message = await receive()
    if message["type"] != "http.request":
        return None
    body: bytes = message["body"]
    if message["more_body"]:
        parts, size = [body], len(body)
        while message["more_body"]:
            message = await receive()
            if message["type"] != "http.request":
                return None
            size += len(message["body"])
            if size > limit_bytes:
                raise errors.too_large(limit_bytes)
            parts.append(message["body"])
        body = b"".join(parts)
    if len(body) > limit_bytes:
        raise errors.too_large(limit_bytes)
    return body


def understand(exchange: Exchange, raw: bytes) -> None:
    """Parse the body and check what may not steer the engine; sets document, model and stream."""
    exchange.body_bytes = len(raw)
    exchange.document = document = parse(raw)
    for name in _STEERING:
        if name in document and document[name] is not None:
            raise errors.bad_request(
                "field_not_allowed", f"'{name}' steers the engine and is set by the gateway. Leave it out.", param=name
            )
    if _holds_media(document):
        _refuse_remote_media(document)
    stream = document.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise errors.bad_request("invalid_field", "'stream' is true or false.", param="stream")
    operation = exchange.operation
    exchange.stream = bool(stream) and operation is not None and operation.streams
    choices = document.get("n")
    if isinstance(choices, int) and choices > MAX_CHOICES:
        raise errors.bad_request("invalid_field", f"'n' is at most {MAX_CHOICES}.", param="n")
    model = document.get("model")
    if model is not None and not isinstance(model, str):
        raise errors.bad_request("invalid_field", "'model' is a string.", param="model")
    exchange.model = model or ""


def prepare(exchange: Exchange, cache_salt: str) -> None:
    """Serialise the request for the engine, with the fields that the gateway sets."""
    document = exchange.document
    operation = exchange.operation
    name = operation.name if operation else ""
    document["model"] = exchange.model
    if name in _SALTED:
        document["cache_salt"] = cache_salt
    if name == "responses.create":
        _own_nothing(document)
    elif exchange.stream and exchange.dialect == "openai":
        options = document.get("stream_options")
        if options is None:
            options = {}
        elif not isinstance(options, dict):
            raise errors.bad_request("invalid_field", "'stream_options' is an object.", param="stream_options")
        exchange.strip_usage = not options.get("include_usage")
        document["stream_options"] = {**options, "include_usage": True}
    try:
        exchange.payload = _ENCODER.encode(document)
    except (UnicodeEncodeError, ValueError, OverflowError, RecursionError):
        raise _bad_json("A string holds a lone surrogate.") from None


def _own_nothing(document: JsonObject) -> None:
    """The engine's store of responses has no owner check: nothing is stored, nothing looked up."""
    for name in ("previous_response_id", "conversation"):
        if document.get(name) is not None:
            raise errors.bad_request(
                "field_not_allowed", f"'{name}' is not served: responses are not stored.", param=name
            )
    if document.get("background"):
        raise errors.bad_request(
            "field_not_allowed", "'background' is not served: responses are not stored.", param="background"
        )
    document["store"] = False


def _refuse_remote_media(node: object, key: str = "") -> None:
    """Refuse media by URL anywhere outside tool schemas and arguments, unless it is `data:`."""
    stack = [(node, key, 0)]
    while stack:
        value, name, media = stack.pop()
        if isinstance(value, dict):
            tool_use = value.get("type") in {"tool_use", "function_call", "function"}
            for child_key, child in cast("JsonObject", value).items():
                if child_key in _OPAQUE_KEYS or (tool_use and child_key == "input"):
                    continue
                stack.append((child, child_key, media or child_key in _MEDIA_KEYS))
        elif isinstance(value, list):
            stack.extend((child, name, media) for child in value)
        elif media and isinstance(value, str) and name in {*_MEDIA_KEYS, "url"} and not value.startswith("data:"):
            raise errors.bad_request("remote_media", "Media is accepted inline only, as a data: URL.", param=name)
