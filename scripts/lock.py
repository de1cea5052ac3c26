"""Write the lock files from pyproject.toml: every version pinned, every file's hash listed.

Rules:
- Locks agree: `runtime` is resolved first and every other lock is held to its versions, then to `dev`'s.
- A run keeps the versions that are locked now; `--upgrade` looks for newer ones.
- CPU locks serve linux on x86_64 and aarch64: what only one of the two needs carries a marker.
- torch in the CPU lock is PyTorch's CPU build and nothing else: a CUDA build of the same version is refused by
  its hash rather than installed.
- Everything locked is a wheel for these platforms: nothing is built where it is installed.
- No index, host or path of the machine that resolved ends up in a lock.

Started by scripts/lock.sh, which provides `uv`.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "requirements"
# The oldest C library served is that of Debian 12 and Ubuntu 22.04.
PLATFORMS = {"x86_64": "x86_64-manylinux_2_35", "aarch64": "aarch64-manylinux_2_35"}
# torch-2.13.0+cpu-cp311-cp311-manylinux_2_28 for x86_64 and for aarch64, as on PyTorch's own CPU index.
TORCH_CPU = """torch==2.13.0 \\
    --hash=sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b \\
    --hash=sha256:84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7"""
CPU_ENGINE = (
    "--override",
    "requirements/engine-cpu.overrides",
    "--config-file",
    "requirements/engine-cpu.uv.toml",
)

Entries = dict[str, str]


def entries(text: str) -> Entries:
    """The blocks of a lock by distribution: a pin and its hashes."""
    blocks = [block for block in re.split(r"\n(?=[a-z0-9])", text.strip()) if block[:1].isalnum()]
    return {re.split(r"[=\[; ]", block, maxsplit=1)[0]: block for block in blocks}


def pins(locked: Entries) -> list[str]:
    """The `name==version` of every block."""
    return [re.split(r"[ ;]", re.sub(r"\[[^]]*\]", "", block))[0] for block in locked.values()]


class Locker:
    """Resolves, holding everything to the pins it has been given so far."""

    def __init__(self, work: Path, upgrade: bool) -> None:
        self._work = work
        self._upgrade = upgrade
        self._held: Entries = {}

    def hold(self, locked: Entries) -> None:
        """Every later resolution uses these versions."""
        self._held = locked | self._held

    def resolve(self, source: str, previous: Entries, *options: str, platform: str) -> Entries:
        """The pinned and hashed requirements of `source` on one platform."""
        constraints = self._work / "constraints.txt"
        constraints.write_text("\n".join(pins(self._held)) + "\n")
        output = self._work / "resolved.txt"
        output.write_text("" if self._upgrade else "\n".join(pins(previous)) + "\n")
        command = ["uv", "pip", "compile", source, "--generate-hashes", "--no-annotate", "--no-header", "--quiet"]
        command += ["--no-emit-index-url", "--no-emit-find-links", "--only-binary", ":all:", "--python-version", "3.11"]
        command += ["--python-platform", PLATFORMS[platform], "--constraint", str(constraints)]
        command += [*options, "--output-file", str(output)]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            sys.exit(f"lock: {source} cannot be resolved for {platform}; no lock of it was written")
        return entries(output.read_text())

    def lock(self, name: str, source: str, *options: str, platforms: tuple[str, ...] = tuple(PLATFORMS)) -> Entries:
        """Write one lock, the union of its platforms; return its entries."""
        path = LOCKS / f"{name}.lock"
        previous = entries(path.read_text()) if path.exists() else {}
        merged: Entries = {}
        found: dict[str, list[str]] = {}
        for platform in platforms:
            for distribution, block in self.resolve(source, previous | merged, *options, platform=platform).items():
                if merged.setdefault(distribution, block) != block:
                    sys.exit(f"lock: {distribution} differs between platforms in {name}")
                found.setdefault(distribution, []).append(platform)
        for distribution, where in found.items():
            if len(where) < len(platforms):
                pin, _, hashes = merged[distribution].partition(" ")
                merged[distribution] = f'{pin} ; platform_machine == "{where[0]}" {hashes}'
        if "--override" in options:
            merged["torch"] = TORCH_CPU
        text = "\n".join(merged[distribution] for distribution in sorted(merged)) + "\n"
        path.write_text(text)
        print(f"lock: {name}: {len(merged)} requirements", flush=True)
        return merged


def main() -> None:
    """Lock everything, the narrowest first."""
    parser = argparse.ArgumentParser(description="Write requirements/*.lock from pyproject.toml.")
    parser.add_argument("--upgrade", action="store_true", help="look for newer versions")
    parser.add_argument("--work", type=Path, required=True, help="an empty scratch folder")
    arguments = parser.parse_args()
    locker = Locker(arguments.work, arguments.upgrade)
    locker.lock("resolver", "requirements/resolver.in")
    locker.hold(locker.lock("bootstrap", "requirements/bootstrap.in"))
    locker.hold(locker.lock("runtime", "pyproject.toml"))
    # The engine's wheel narrows some libraries that tools share, so it goes before them.
    cpu = locker.lock("runtime-cpu", "pyproject.toml", "--extra", "engine-cpu", *CPU_ENGINE)
    tools = Locker(arguments.work, arguments.upgrade)
    tools.hold(cpu)
    dev = tools.lock("dev", "pyproject.toml", "--extra", "dev")
    locker.hold(dev)
    locker.lock("runtime-cuda", "pyproject.toml", "--extra", "engine-cuda", platforms=("x86_64",))


if __name__ == "__main__":
    main()
