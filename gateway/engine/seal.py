"""The seal: the engine runs where the kernel knows no way out, and that is checked, not assumed.

bubblewrap makes new user, network, IPC, PID and UTS namespaces; only what the engine needs is bound, read-only, and
its own run directory read-write. Sources: bwrap(1), namespaces(7), capabilities(7).
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gateway.engine.errors import EngineError

PROBE_S = 20.0
INSTALL = "apt-get install bubblewrap"
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin")
_ETC = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf",
        "/etc/localtime", "/etc/alternatives", "/etc/OpenCL")  # fmt: skip
_TOPOLOGY = "/sys/devices/system"  # which processors and memory nodes there are
_GPU = ("/sys/devices", "/sys/module", "/sys/class", "/sys/bus", "/proc/driver")

PROBE = r"""
import json, os, socket, sys
results = {}
def attempt(name, action):
    try:
        action()
        results[name] = "reached"
    except OSError as error:
        results[name] = type(error).__name__
def tcp(host, port, family=socket.AF_INET):
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.settimeout(2); s.connect((host, port))
def udp():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect(("192.0.2.1", 53)); s.send(b"x")
def raw():
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()
attempt("host_tcp", lambda: tcp("127.0.0.1", int(sys.argv[1])))
attempt("tcp", lambda: tcp("192.0.2.1", 443))
attempt("tcp6", lambda: tcp("2001:db8::1", 443, socket.AF_INET6))
attempt("metadata", lambda: tcp("169.254.169.254", 80))
attempt("udp", udp)
attempt("dns", lambda: socket.getaddrinfo("example.com", 443))
with open("/proc/net/dev") as file:
    results["interfaces"] = sorted(line.partition(":")[0].strip() for line in file if ":" in line)
with open("/proc/self/status") as file:
    results["capabilities"] = next(line.split()[1] for line in file if line.startswith("CapEff"))
results["net"] = os.readlink("/proc/self/ns/net")
print(json.dumps(results))
"""


@dataclass(frozen=True, slots=True)
class SealReport:
    """What the probe inside the sandbox found."""

    sealed: bool
    interfaces: tuple[str, ...]
    attempts: Mapping[str, str]
    capabilities: str
    reason: str

    def as_fields(self) -> dict[str, object]:
        """For records and state files."""
        return {**asdict(self), "interfaces": list(self.interfaces)}


def sandbox(run_dir: Path, read_only: Sequence[Path], environment: Mapping[str, str], *, gpu: bool) -> list[str]:
    """The bubblewrap command line up to the program; raises EngineError when bubblewrap is missing."""
    program = shutil.which("bwrap")
    if program is None:
        raise EngineError(f"bubblewrap is missing, so the engine cannot be sealed. Install it: {INSTALL}")
    line = [program, "--unshare-user", "--unshare-net", "--unshare-ipc", "--unshare-pid", "--unshare-uts",
            "--unshare-cgroup-try", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv",
            "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/dev/shm", "--tmpfs", "/tmp"]  # fmt: skip  # noqa: S108
    for name in (*_SYSTEM, *_ETC, _TOPOLOGY):
        if Path(name).is_symlink():
            line += ["--symlink", str(Path(name).readlink()), name]
        elif Path(name).exists():
            line += ["--ro-bind", name, name]
    if gpu:
        for device in sorted(Path("/dev").glob("nvidia*")):
            line += ["--dev-bind", str(device), str(device)]
        line += [word for name in _GPU if Path(name).exists() for word in ("--ro-bind", name, name)]
    for path in _outermost([*_interpreter(), *read_only]):
        line += ["--ro-bind", str(path), str(path)]
    line += ["--bind", str(run_dir), str(run_dir), "--chdir", str(run_dir)]
    for name, value in environment.items():
        line += ["--setenv", name, value]
    return [*line, "--"]


def probe(command: Sequence[str]) -> SealReport:
    """Run the probe in the same sandbox; it must reach nothing and see only `lo`."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        port = str(listener.getsockname()[1])
        try:
            done = subprocess.run(
                [*command, sys.executable, "-I", "-c", PROBE, port],
                capture_output=True,
                text=True,
                timeout=PROBE_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return SealReport(False, (), {}, "", f"the probe did not run: {type(error).__name__}")
    if done.returncode != 0:
        return SealReport(False, (), {}, "", f"the sandbox does not start: {done.stderr.strip()[-200:]}")
    found = json.loads(done.stdout)
    interfaces, capabilities = tuple(found.pop("interfaces")), found.pop("capabilities")
    own_net = found.pop("net") == os.readlink("/proc/self/ns/net")
    reached = [name for name, result in found.items() if result == "reached"]
    reason = ""
    if reached:
        reason = f"the probe reached: {', '.join(reached)}"
    elif interfaces != ("lo",):
        reason = f"the sandbox has more interfaces than lo: {', '.join(interfaces)}"
    elif own_net or int(capabilities, 16):
        reason = "the sandbox shares the network namespace or holds capabilities"
    return SealReport(not reason, interfaces, found, capabilities, reason)


def only_loopback(pid: int) -> bool:
    """Whether a process lives in another network namespace than ours that has only `lo`."""
    try:
        lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
        other = os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return False
    return [line.partition(":")[0].strip() for line in lines] == ["lo"] and other != os.readlink("/proc/self/ns/net")


def inside(pid: int) -> int:
    """The program that a bubblewrap process runs: the first descendant that is not bubblewrap itself."""
    wrapper = shutil.which("bwrap")
    while wrapper is not None:
        try:
            if not Path(os.readlink(f"/proc/{pid}/exe")).samefile(wrapper):
                return pid
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        except (OSError, IndexError, ValueError):
            return pid
    return pid


def _interpreter() -> list[Path]:
    """What this interpreter needs: its environment and the installation behind it."""
    return [Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()]


def _outermost(paths: Sequence[Path]) -> list[Path]:
    """The paths without those below another one or below what is bound anyway."""
    kept: list[Path] = []
    for path in sorted(set(paths), key=lambda item: len(item.parts)):
        bound = any(path.is_relative_to(parent) for parent in (*kept, *(Path(top) for top in _SYSTEM)))
        if not bound and path.exists():
            kept.append(path)
    return kept
