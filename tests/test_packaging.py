"""The project's files agree with each other: dependencies, version, wheel, README, and what must not be in them."""

from __future__ import annotations

import importlib.metadata
import os
import re
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
# What conda needs beside the dependencies: the language, the installer, and torchvision of the same build as torch.
CONDA_ONLY = {"python", "pip", "hatchling", "torchvision"}

# Spelt in pieces, so that this file may be among those that are searched.
FORBIDDEN = re.compile(
    "|".join(
        [
            r"py" r"pi\.org", r"python" r"hosted\.org", r"npm" r"js\.(com|org)", r"download\.py" r"torch\.org",
            r"conda\.ana" r"conda\.org", r"deb\." r"debian\.org", r"(?<![\w./-])/wo" r"rk/", r"/opt/whe" r"els",
            r"/ro" r"ot/\.",
        ]
    )
)  # fmt: skip


def floors(*groups: str) -> dict[str, str]:
    """Conda name -> version specifier of the core dependencies and of the named extras."""
    texts = list(PROJECT["dependencies"])
    for group in groups:
        texts += PROJECT["optional-dependencies"][group]
    requirements = map(Requirement, texts)
    return {CONDA_NAMES.get(r.name, r.name): str(r.specifier) for r in requirements}


def conda_floors(path: str) -> dict[str, str]:
    """Name -> version specifier in a conda environment file, without what only conda needs."""
    listed = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))["dependencies"]
    pairs = [re.fullmatch(r"([\w-]+)(.*)", text) for text in listed if isinstance(text, str)]
    found = {pair[1].replace("pytorch-cpu", "pytorch"): pair[2] for pair in pairs if pair}
    return {name: floor for name, floor in found.items() if name not in CONDA_ONLY}


def project_files() -> list[Path]:
    """What git tracks, or would track at the next `git add`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout, so which files belong to the project is unknown")
    paths = [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


# ---------------------------------------------------------------------------------------------------------------------
# Dependencies: one truth, told three times


def test_environment_yml_has_the_floors_of_pyproject() -> None:
    assert conda_floors("environment.yml") == floors("torch", "lab", "app", "quant", "peft")


def test_binder_has_the_floors_of_pyproject() -> None:
    assert conda_floors("binder/environment.yml") == floors("torch", "lab", "app", "quant", "peft")


def test_binder_is_cpu_only_and_pins_python() -> None:
    listed = yaml.safe_load((ROOT / "binder/environment.yml").read_text(encoding="utf-8"))["dependencies"]
    assert any(text.startswith("pytorch-cpu") for text in listed)
    assert any(re.fullmatch(r"python=3\.\d+\.\d+", text) for text in listed)


def test_binder_installs_bigkit_and_fails_loudly() -> None:
    script = ROOT / "binder/postBuild"
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/bin/bash" and "set -e" in lines
    assert any(line.startswith("pip install --no-deps") and line.endswith(" .") for line in lines)
    assert os.access(script, os.X_OK)


def test_every_dependency_is_pinned_once_for_each_python() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    extras = [text for texts in PROJECT["optional-dependencies"].values() for text in texts]
    for requirement in map(Requirement, PROJECT["dependencies"] + extras):
        for python in ("3.10", "3.11", "3.12", "3.13"):
            where = {"python_version": python, "python_full_version": f"{python}.0"}
            if requirement.marker and not requirement.marker.evaluate(where):
                continue
            serving = [
                pin for pin in pins
                if canonicalize_name(pin.name) == canonicalize_name(requirement.name)
                and (pin.marker is None or pin.marker.evaluate(where))
            ]  # fmt: skip
            assert len(serving) == 1, f"{requirement.name} has {len(serving)} pins for Python {python}"
            version = str(serving[0].specifier).removeprefix("==")
            assert requirement.specifier.contains(version), f"{serving[0]} does not serve {requirement}"


# ---------------------------------------------------------------------------------------------------------------------
# What is installed


def test_version_is_told_once() -> None:
    import bigkit

    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?(a|b|rc|dev)\d+)?", bigkit.__version__)
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    assert importlib.metadata.version("bigkit") == bigkit.__version__


def test_import_is_light() -> None:
    heavy = ("torch", "transformers", "timm", "numpy", "matplotlib", "ipywidgets", "huggingface_hub", "accelerate")
    code = f"import sys, bigkit; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_library_never_imports_its_oracle() -> None:
    imports = re.compile(r"^\s*(import|from)\s+accelerate\b", re.MULTILINE)
    assert [str(path) for path in (ROOT / "bigkit").rglob("*.py") if imports.search(path.read_text())] == []


def test_wheel_has_every_file_of_the_package(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    (built,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(built) as wheel:
        inside = set(wheel.namelist())
        metadata = wheel.read(next(name for name in inside if name.endswith(".dist-info/METADATA"))).decode()
        scripts = wheel.read(next(name for name in inside if name.endswith("entry_points.txt"))).decode()
    ours = {p.relative_to(ROOT).as_posix() for p in project_files() if p.is_relative_to(ROOT / "bigkit")}
    assert ours and {name for name in inside if name.startswith("bigkit/")} == ours
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    assert "Requires-Python: >=3.10" in metadata
    assert "bigkit = bigkit.cli:main" in scripts
    assert Path(built).stat().st_size < 40e6


# ---------------------------------------------------------------------------------------------------------------------
# What a visitor sees


def test_top_level_is_by_design() -> None:
    expected = {
        ".ci", ".gitignore", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "benchmarks", "bigkit", "binder",
        "constraints.txt", "environment.yml", "notebooks", "pyproject.toml", "scripts", "tests",
    }  # fmt: skip
    assert {path.relative_to(ROOT).parts[0] for path in project_files()} <= expected


def test_readme_names_commands_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+)(?: \w+)*:(?!=)", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make (\w+)", readme, re.MULTILINE))
    assert {"lab", "test"} <= named <= targets
    assert "\nmake test && exit\n" in (ROOT / ".ci/run").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "bigkit/accelerate/README.md"]
)
def test_local_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert targets and [target for target in targets if not (page.parent / target).exists()] == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


def test_tables_are_those_of_the_kept_results() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "benchmark_tables.py"), "--check"]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.soak
def test_the_reference_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "make_docs.py"), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    assert "Place a model's layers on devices" in (tmp_path / "bigkit.html").read_text(encoding="utf-8")


def test_no_file_names_a_registry_or_this_machine() -> None:
    found = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and pictures
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in FORBIDDEN.finditer(text)]
    assert found == []


# ---------------------------------------------------------------------------------------------------------------------
# What the tests stand on


def test_tests_reach_this_machine_and_no_other() -> None:
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
    with socket.socket() as client, pytest.raises(AssertionError, match=r"192\.0\.2\.1"):
        client.connect(("192.0.2.1", 80))  # an address kept for documentation: nobody answers there


@pytest.mark.parametrize("required", ["0", "1"])
def test_missing_browser_skips_or_fails_as_told(required: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.browser.conftest import missing

    monkeypatch.setenv("BIGKIT_REQUIRE_BROWSER", required)
    expected = pytest.fail.Exception if required == "1" else pytest.skip.Exception
    with pytest.raises(expected, match="no browser"):
        missing("no browser")
