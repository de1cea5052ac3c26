"""What the repository promises about itself: locks, packaging, make targets, and words that have no place in it.

Rules: names that no file may hold are put together here, so that this file does not hold them either.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gateway

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
LOCKS = ("bootstrap", "resolver", "runtime", "runtime-cpu", "runtime-cuda", "dev")
TARGETS = ("setup", "run", "test", "test-full", "lint", "lock", "clean")
TORCH_CPU_X86_64 = "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"
TORCH_CPU_AARCH64 = "84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7"
# Trained and evaluated with the engine's libraries, never imported by a server.
NEEDS_THE_ENGINE = ("gateway/starter/train.py", "gateway/starter/evaluate.py", "gateway/embedded.py")

HOSTS = tuple(
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("debian", "org"),
        ("npmjs", "org"),
        ("npmjs", "com"),
        ("yarnpkg", "com"),
        ("pytorch", "org"),
        ("crates", "io"),
        ("proxy", "golang", "org"),
    )
)
FORBIDDEN = {
    "a registry's host": "|".join(re.escape(host) for host in HOSTS),
    "a path of one machine": "|".join(
        rf"(?<![\w.]){re.escape('/'.join(parts))}(?![\w-])"
        for parts in (
            ("", "work", "main"),
            ("", "work", "shared"),
            ("", "root"),
            ("", "opt", "pypi"),
            ("", "opt", "wheels"),
        )
    ),
    "where it was written": "|".join(
        (
            r"\bC" + r"EO\b",
            r"(?i:\bwork" + r"place\b)",
            r"\bshared" + r"/(?:DESIGN|ENGINE|STYLE|bench)",
            "/tmp/" + "peers",
        )
    ),
}


@cache
def files() -> tuple[Path, ...]:
    """What is committed or about to be."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("what belongs to the repository is known in a git checkout only")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True, text=True).stdout
    paths = sorted({REPOSITORY / name for name in listed.split("\0") if name})
    return tuple(path for path in paths if path.is_file())


@cache
def lock(name: str) -> dict[str, str]:
    """The blocks of a lock by distribution."""
    text = (REPOSITORY / "requirements" / f"{name}.lock").read_text()
    blocks = re.split(r"\n(?=\S)", text.strip())
    return {canonicalize_name(re.split(r"[=\[; ]", block)[0]): block for block in blocks}


def versions(name: str) -> dict[str, str]:
    found = {distribution: re.search(r"==([^ ;\\]+)", block) for distribution, block in lock(name).items()}
    assert all(found.values())
    return {distribution: match[1] for distribution, match in found.items() if match}


def declared(*extras: str) -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("kind", FORBIDDEN)
def test_no_file_holds_it(kind: str) -> None:
    pattern = re.compile(FORBIDDEN[kind])
    assert [
        f"{path.relative_to(REPOSITORY)}: {found[0]}"
        for path in files()
        if path.suffix != ".safetensors"
        and (found := pattern.search(path.read_text(encoding="utf-8", errors="replace")))
    ] == []


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("a registry's host", "https://files." + HOSTS[1] + "/x"),
        ("a path of one machine", "home = " + "/ro" + "ot/x"),
        ("where it was written", "ask the C" + "EO"),
    ],
)
def test_it_would_be_found(kind: str, text: str) -> None:
    assert re.search(FORBIDDEN[kind], text)


def test_a_name_that_only_resembles_a_machine_path_is_fine() -> None:
    assert not re.search(FORBIDDEN["a path of one machine"], "/tree/root /roots ./root")


@pytest.mark.parametrize("name", LOCKS)
def test_every_line_of_a_lock_is_a_pin_or_its_hash(name: str) -> None:
    pin = re.compile(
        r'[a-z0-9][a-z0-9._-]*(\[[a-z0-9,_-]+\])?==[^ ;\\]+( ; platform_machine == "(x86_64|aarch64)")?'
        r"( \\\n    --hash=sha256:[0-9a-f]{64})+"
    )
    assert [block for block in lock(name).values() if not pin.fullmatch(block)] == []


@pytest.mark.parametrize("other", ["runtime-cpu", "runtime-cuda", "dev"])
def test_the_gateway_is_the_same_with_every_engine(other: str) -> None:
    assert versions("runtime").items() <= versions(other).items()


@pytest.mark.parametrize("engine", ["runtime-cpu", "runtime-cuda"])
def test_the_tools_fit_beside_every_engine(engine: str) -> None:
    held = versions(engine) | versions("bootstrap")
    assert {name: version for name, version in versions("dev").items() if held.get(name, version) != version} == {}
    assert versions(engine).get("setuptools") == versions("bootstrap")["setuptools"]


@pytest.mark.parametrize(
    ("name", "extras"),
    [("runtime", ()), ("runtime-cpu", ("engine-cpu",)), ("runtime-cuda", ("engine-cuda",)), ("dev", ("dev",))],
)
def test_a_lock_holds_what_the_project_asks_for(name: str, extras: tuple[str, ...]) -> None:
    locked = versions(name)
    assert [
        str(wanted)
        for wanted in declared(*extras)
        if not wanted.specifier.contains(locked.get(canonicalize_name(wanted.name)) or "none")
    ] == []


def test_only_the_cpu_build_of_torch_can_be_installed_for_the_cpu() -> None:
    hashes = set(re.findall(r"sha256:([0-9a-f]{64})", lock("runtime-cpu")["torch"]))
    assert hashes == {TORCH_CPU_X86_64, TORCH_CPU_AARCH64}
    assert not [name for name in lock("runtime-cpu") if re.match(r"nvidia-|cuda-|torch(vision|audio|codec)", name)]


def test_everything_imported_is_declared() -> None:
    distributions = packages_distributions()
    names = {canonicalize_name(wanted.name) for wanted in declared()}
    missing = set()
    for path in files():
        place = path.relative_to(REPOSITORY).as_posix()
        if not place.startswith(("gateway/", "offline_bundle/")) or path.suffix != ".py" or place in NEEDS_THE_ENGINE:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {module.partition(".")[0] for module in modules}:
                if top in sys.stdlib_module_names or top in ("gateway", "offline_bundle"):
                    continue
                if not names & {canonicalize_name(name) for name in distributions.get(top, [])}:
                    missing.add(f"{place}: {top}")
    assert missing == set()


def test_one_version_everywhere() -> None:
    assert gateway.__version__ == PROJECT["version"]
    assert f"## [{PROJECT['version']}]" in (REPOSITORY / "CHANGELOG.md").read_text()


def test_the_wheel_holds_all_that_is_in_the_packages(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    wanted = set()
    for path in files():
        place = path.relative_to(REPOSITORY)
        if place.parts[0] in ("gateway", "offline_bundle"):
            wanted.add(place.as_posix())
        elif len(place.parts) > 1:
            continue
        (copy / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy / place)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(copy)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("cloister-*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == wanted


def test_the_make_targets_exist() -> None:
    text = (REPOSITORY / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony is not None
    assert phony[1].split() == list(TARGETS)
    assert re.findall(r"^([a-z-]+):", text, re.MULTILINE) == list(TARGETS)
    for script in re.findall(r"scripts/[a-z-]+\.(?:sh|py)", text):
        assert (REPOSITORY / script).is_file()


def test_ci_runs_make_test() -> None:
    assert (REPOSITORY / ".ci/run").read_text().splitlines()[-1] == "exec make test"


@pytest.mark.parametrize("script", [*sorted((REPOSITORY / "scripts").glob("*.sh")), REPOSITORY / ".ci/run"], ids=str)
def test_a_script_can_be_run(script: Path) -> None:
    assert os.access(script, os.X_OK)
    shell = script.read_text().splitlines()[0].split("/")[-1].split()[-1]
    subprocess.run([shell, "-n", str(script)], check=True)


def test_an_unknown_engine_is_refused() -> None:
    environment = os.environ | {"CLOISTER_ENGINE": "quantum"}
    done = subprocess.run(["scripts/setup.sh"], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "cpu, cuda or none" in done.stderr


def test_a_missing_interpreter_is_said(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    script = shutil.copy(REPOSITORY / "scripts" / "find-python.sh", tmp_path / "scripts")
    environment = {"PATH": str(tmp_path)}
    command = ["/bin/sh", script]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 3
    assert "apt-get install python3.11" in done.stderr
    assert "CLOISTER_PYTHON" in done.stderr
