"""The configuration of the project: what a wheel would ship, pins that fit their ranges, commands that exist."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from setuptools import find_packages

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = ("constraints.txt", "constraints-oldest.txt")


def requirements() -> list[Requirement]:
    extras = PROJECT["project"]["optional-dependencies"].values()
    lines = [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]
    return [found for found in map(Requirement, lines) if found.name != "fastdiff-attention"]


def pins(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("name", PINS)
class TestPins:
    def test_are_exact_and_pinned_once_for_each_python(self, name):
        for python in ("3.10", "3.11", "3.12", "3.13"):
            environment = default_environment() | {"python_version": python, "platform_system": "Linux"}
            here = [pin for pin in pins(name) if pin.marker is None or pin.marker.evaluate(environment)]
            assert len({pin.name.lower() for pin in here}) == len(here)
            assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in here)

    def test_fit_the_ranges_and_leave_nothing_out(self, name):
        pinned = pins(name)
        for wanted in requirements():
            versions = [pin for pin in pinned if pin.name.lower() == wanted.name.lower()]
            assert versions, f"{wanted.name} has no pin in {name}"
            for pin in versions:
                assert wanted.specifier.contains(str(pin.specifier).removeprefix("=="))

    def test_name_what_torch_cpu_and_old_diffusers_do_not_bring(self, name):
        assert {"triton", "ftfy"} <= {pin.name for pin in pins(name)}


def test_oldest_pins_are_the_lower_bounds():
    # torch's own lower bound has no CPU build to test with, and triton's is that torch's.
    oldest = {pin.name: str(pin.specifier).removeprefix("==") for pin in pins("constraints-oldest.txt")}
    for wanted in requirements():
        bound = next(str(part).removeprefix(">=") for part in wanted.specifier if part.operator == ">=")
        if wanted.name not in ("torch", "triton", "ruff"):
            assert oldest[wanted.name].startswith(bound.rstrip("0").rstrip(".")), wanted.name


def test_a_wheel_ships_the_four_floors():
    found = PROJECT["tool"]["setuptools"]["packages"]["find"]
    packages = {name for root in found["where"] for name in find_packages(str(ROOT / root), include=found["include"])}
    assert {"fastdiff", "fastdiff_apps", "fastdiff_kernels", "fastdiff_patches"} <= packages
    assert {"fastdiff.assets", "fastdiff.commands", "fastdiff.measure", "fastdiff.methods"} <= packages
    assert not {"kernels", "tests", "scripts"} & packages


def test_a_wheel_ships_every_file_of_the_embedded_models():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["fastdiff"]
    shipped = {path for pattern in patterns for path in (ROOT / "fastdiff").glob(pattern)}
    folders = [path.parent for path in (ROOT / "fastdiff/assets").glob("*/model_index.json")]
    for folder in folders:
        left_out = {path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"} - shipped
        assert not left_out, "extend package-data in pyproject.toml"


def test_the_command_exists():
    module, _, function = PROJECT["project"]["scripts"]["fastdiff"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_versions_agree():
    import fastdiff

    assert fastdiff.__version__ == PROJECT["project"]["version"]
    assert f"[{fastdiff.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_no_document_installs_the_other_fastdiff():
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        assert re.search(r"pip install fastdiff(?!-attention)", path.read_text()) is None, path.name


def test_tasks_need_the_standard_library_only():
    code = "import sys, runpy; sys.argv = ['tasks.py']; runpy.run_path('scripts/tasks.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "demo" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="no permission bits there")
def test_ci_can_be_run():
    assert os.access(ROOT / ".ci/run", os.X_OK)
