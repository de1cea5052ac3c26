"""Frozen settings from one TOML file; every check happens at load, unknown keys are errors.

A `Settings` that exists is valid: nothing downstream checks a setting again. Relative paths in
`[store]`, `[audit]` and `[policy]` are relative to the state folder (`CLOISTER_HOME`); a model path is
relative to the file that names it.
"""

import difflib
import hashlib
import ipaddress
import os
import re
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

HOME_VARIABLE = "CLOISTER_HOME"
DEFAULT_HOME = ".cloister"
STARTER = "starter"
STARTER_ARGS = ("--max-model-len", "2048", "--enable-auto-tool-choice", "--tool-call-parser", "hermes")
ENGINE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
MAX_CONFIG_BYTES = 1 << 20
MAX_HOME_CHARS = 56


class ConfigError(Exception):
    """The settings cannot be used; the message says which key and what to write instead."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Address(_Table):
    """Where a listener binds: `host` and `port`, or a unix socket `path`."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Parse `host:port`, `[v6]:port` or `unix:/absolute/path`; raises ValueError with what to write."""
    if text.startswith("unix:"):
        path = text[5:]
        if not path.startswith("/") or len(path) > 100:
            raise ValueError("a unix socket is written unix:/absolute/path of at most 100 characters")
        return Address(path=path)
    host, separator, port = text.rpartition(":")
    if not separator or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError("an address is written host:port, [v6]:port or unix:/path")
    host = host.removeprefix("[").removesuffix("]")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if host != "localhost":
            raise ValueError("the host of an address is a literal IP address or localhost") from None
    return Address(host=host, port=int(port))


class _Listener(_Table):
    listen: str

    @field_validator("listen")
    @classmethod
    def _well_formed(cls, value: str) -> str:
        parse_address(value)
        return value

    @property
    def address(self) -> Address:
        """The parsed listening address."""
        return parse_address(self.listen)


class Server(_Listener):
    """The data port and its bounds; sizes in bytes, times in seconds."""

    listen: str = Field(default="127.0.0.1:8080", description="data port: host:port, or unix:/path")
    workers: Annotated[int, Field(ge=1, le=256, description="gateway worker processes")] = 1
    max_body_bytes: Annotated[int, Field(ge=1024, le=1 << 30)] = 32 << 20
    max_header_count: Annotated[int, Field(ge=8, le=1000)] = 100
    max_header_bytes: Annotated[int, Field(ge=1024, le=1 << 20)] = 32 << 10
    request_deadline_s: Annotated[float, Field(gt=0, le=3600, description="to receive a whole request")] = 30.0
    keep_alive_s: Annotated[float, Field(gt=0, le=3600)] = 75.0
    max_connections: Annotated[int, Field(ge=1, le=1_000_000, description="per worker")] = 16384
    drain_s: Annotated[float, Field(ge=0, le=86400, description="running streams may finish within")] = 60.0


class Ops(_Listener):
    """The ops port: metrics, health, admin API."""

    listen: str = Field(default="127.0.0.1:9090", description="ops port")


class StoreTable(_Table):
    """Where state lives."""

    url: str = Field(
        default="sqlite:///state.db", description="sqlite:///FILE below CLOISTER_HOME, or postgresql+asyncpg://…"
    )

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        if not value.startswith(("sqlite:///", "postgresql+asyncpg://")):
            raise ValueError("write sqlite:///FILE or postgresql+asyncpg://…")
        return value


class Audit(_Table):
    """The audit log."""

    dir: str = "audit"
    durability: Literal["fsync", "os"] = "fsync"
    content: Literal["none"] = "none"
    deadline_s: Annotated[float, Field(gt=0, le=60, description="for one record to become durable")] = 1.0


class PolicyTable(_Table):
    """Which policy decides and which models may be served."""

    dir: str = "policy"
    models: Literal["any"] = "any"


class Identity(_Table):
    """How callers prove themselves."""

    environment: Annotated[str, Field(pattern=r"^[a-z0-9]{2,8}$", description="the <env> in API keys")] = "live"


class Engine(_Table):
    """One served model and how it is run."""

    name: str
    model: str = ""
    replicas: Annotated[int, Field(ge=1, le=64)] = 1
    seal: Literal["required", "none"] = "required"
    args: tuple[str, ...] = ()
    urls: tuple[str, ...] = ()
    key_file: str = ""
    start_timeout_s: Annotated[float, Field(gt=0, le=86400)] = 1800.0
    hang_timeout_s: Annotated[float, Field(gt=0, le=3600, description="no progress with work at hand: hung")] = 60.0
    answer_timeout_s: Annotated[float, Field(gt=0, le=86400, description="silence of the engine within an answer")] = (
        600.0
    )

    @field_validator("args", "urls", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not ENGINE_NAME.fullmatch(value) or ".." in value or "//" in value:
            raise ValueError("a name is letters, digits and . _ / - (128 at most), no '..' and no '//'")
        return value

    @field_validator("urls")
    @classmethod
    def _engine_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for url in value:
            if not re.fullmatch(r"unix:/.{1,99}|http://[A-Za-z0-9.\-\[\]:]+", url):
                raise ValueError("an engine url is written unix:/path or http://host:port")
        return value

    @model_validator(mode="after")
    def _runs_or_points(self) -> "Engine":
        if bool(self.model) == bool(self.urls):
            raise ValueError("an engine has either a model (we run it) or urls (something else does)")
        if self.urls and (self.args or self.replicas != 1):
            raise ValueError("args and replicas belong to engines with a model, not to urls")
        return self

    @property
    def external(self) -> bool:
        """Whether something other than Cloister runs this engine."""
        return bool(self.urls)


class Settings(_Table):
    """All settings of one host, valid by construction."""

    server: Server = Server()
    ops: Ops = Ops()
    store: StoreTable = StoreTable()
    audit: Audit = Audit()
    policy: PolicyTable = PolicyTable()
    identity: Identity = Identity()
    engine: tuple[Engine, ...] = ()

    @field_validator("engine", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("engine")
    @classmethod
    def _distinct_names(cls, value: tuple[Engine, ...]) -> tuple[Engine, ...]:
        names = [engine.name for engine in value]
        if len(set(names)) != len(names):
            raise ValueError("two engines have the same name")
        return value

    def digest(self) -> str:
        """Hash of the effective settings, as recorded at start: `sha256:<hex>`."""
        return "sha256:" + hashlib.sha256(self.model_dump_json().encode()).hexdigest()


_TABLES: dict[int | str, type[BaseModel]] = {
    "server": Server,
    "ops": Ops,
    "store": StoreTable,
    "audit": Audit,
    "policy": PolicyTable,
    "identity": Identity,
    "engine": Engine,
}


def default_settings() -> Settings:
    """The settings of `cloister up` without a file: the starter model, SQLite, loopback."""
    return Settings(engine=(Engine(name=STARTER, model=STARTER, args=STARTER_ARGS),))


def load(path: Path) -> Settings:
    """Read and check one TOML file; raises ConfigError that names the key and the remedy."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        table = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    return _locate_models(from_table(table), path.parent)


def from_table(table: Mapping[str, Any]) -> Settings:
    """Check a parsed table; raises ConfigError that names each wrong key."""
    try:
        return Settings.model_validate(dict(table))
    except ValidationError as error:
        raise ConfigError(
            "; ".join(_explain(item["loc"], item["type"], item["msg"]) for item in error.errors())
        ) from None


def _locate_models(settings: Settings, base: Path) -> Settings:
    engines = tuple(
        engine.model_copy(update={"model": str((base / engine.model).resolve())})
        if engine.model and engine.model != STARTER and (base / engine.model).is_dir()
        else engine
        for engine in settings.engine
    )
    return settings.model_copy(update={"engine": engines})


def _explain(location: tuple[int | str, ...], kind: str, message: str) -> str:
    where = ".".join(str(part) for part in location) or "settings"
    if kind != "extra_forbidden":
        return f"{where}: {message.removeprefix('Value error, ')}"
    known = list(Settings.model_fields)
    for part in location[:-1]:
        known = list(_TABLES[part].model_fields) if part in _TABLES else known
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"{where}: unknown key" + (f", did you mean {close[0]!r}?" if close else f"; known here: {', '.join(known)}")


def home() -> Path:
    """The state folder, absolute: `CLOISTER_HOME`, else `.cloister` in the working directory."""
    return Path(os.environ.get(HOME_VARIABLE) or DEFAULT_HOME).resolve()


class Layout:
    """Where everything below the state folder lies; creates nothing."""

    def __init__(self, base: Path, settings: Settings) -> None:
        self.home = base
        self.audit = base / settings.audit.dir
        self.policy = base / settings.policy.dir
        self.secrets = base / "secrets"
        self.run = base / "run"
        if len(str(base)) > MAX_HOME_CHARS:  # unix socket paths end at 107 bytes
            tag = hashlib.sha256(str(base).encode()).hexdigest()[:12]
            self.run = Path(tempfile.gettempdir()) / f"cloister-{os.getuid()}-{tag}"
        self.logs = base / "logs"
        self.up_file = base / "up.json"
        self.audit_key = self.secrets / "audit-signing.pem"
        self.pepper = self.secrets / "key-pepper"
        self.auditor_socket = self.run / "auditor" / "sock"
        self.metrics = self.run / "metrics"
        self.pid_file = self.run / "supervisor.json"

    def engine_run(self, name: str, replica: int) -> Path:
        """The run directory of one replica; holds its socket and nothing of anyone else's."""
        return self.run / "e" / f"{safe_name(name)}-{replica}"

    def engine_socket(self, name: str, replica: int) -> Path:
        """The unix socket one replica listens on."""
        return self.engine_run(name, replica) / "sock"

    def engine_state(self, name: str, replica: int) -> Path:
        """The state file that whoever runs the replica writes and the gateway reads."""
        return self.run / "state" / f"{safe_name(name)}-{replica}.json"

    def engine_log(self, name: str, replica: int) -> Path:
        """The replica's log file."""
        return self.logs / f"engine-{safe_name(name)}-{replica}.log"


def safe_name(name: str) -> str:
    """A file name for an engine name: distinct names give distinct files."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:24]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
