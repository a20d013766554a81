"""README.md: its numbers are those of the result files, its links lead somewhere, its commands exist."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import readme_bench
import readme_tables

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ("README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).splitlines()
    return [line for line in lines if line.startswith("fastdiff ")]


def test_the_numbers_are_those_of_the_files():
    assert readme_tables.main(["--check"]) == 0


def test_no_measured_number_is_typed_by_hand():
    sections = r"<!-- begin: (\S+) -->.*?<!-- end: \1 -->"
    code_and_links = r"```.*?```|`[^`]*`|\([^)]*\)"
    names = r"arXiv [\d.]+|Python 3\.10|Apache-2\.0"
    prose = README
    for pattern in (sections, code_and_links, names.replace(" ", r"\s+")):
        prose = re.sub(pattern, "", prose, flags=re.DOTALL)
    assert re.findall(r"\d+\.\d+|\d+ ?(?:%|×|ms|dB|s)\b", prose) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [target for target in targets if target and not (ROOT / target).exists()] == []


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    from fastdiff.cli import app

    _, name, *arguments = shlex.split(command)
    parser = typer.main.get_command(app).commands[name]
    parser.make_context(name, arguments).close()


@pytest.mark.parametrize("code", blocks("python"))
def test_code_names_what_exists(code):
    import fastdiff

    compile(code, "README.md", "exec")
    assert all(hasattr(fastdiff, name) for name in re.findall(r"(?<!from )fastdiff\.(\w+)", code))
    for module, name in re.findall(r"^from (fastdiff\.\w+) import (\w+)$", code, flags=re.MULTILINE):
        assert hasattr(importlib.import_module(module), name)


class TestScript:
    """On results of its own making."""

    RECORD = {
        "kernel": "torch SDPA",
        "shape": "tiny",
        "tokens": 64,
        "heads": 2,
        "head_dim": 16,
        "dtype": "float32",
        "density": 1.0,
        "direction": "forward",
        "milliseconds": 8.0,
        "spread": 0.5,
        "tflops": 0.25,
        "gpu": "none, x86_64 CPU",
        "versions": {"torch": "1.2.3"},
        "commit": "abc1234",
    }

    @pytest.fixture
    def folder(self, tmp_path):
        for file in (file for *files, _ in readme_tables.SECTIONS.values() for file in files):
            if (ROOT / "results" / file).exists():
                (tmp_path / file).write_bytes((ROOT / "results" / file).read_bytes())
        sparse = {**self.RECORD, "kernel": "fastdiff torch", "density": 0.25, "milliseconds": 2.0}
        for file in ("bench-kernels.json", "bench-portable.json"):
            (tmp_path / file).write_text(json.dumps([self.RECORD, sparse]))
        (tmp_path / "README.md").write_text(README, encoding="utf-8")
        return tmp_path

    def run(self, folder, *options):
        return readme_tables.main(["--readme", str(folder / "README.md"), "--results", str(folder), *options])

    def test_fills_once_and_then_agrees(self, folder):
        assert self.run(folder, "--check") == 1
        assert self.run(folder) == 0
        assert self.run(folder, "--check") == 0
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert "| fastdiff torch | 0.250 | 2.00 (0.50) | 4.00× | 0.25 |" in text
        assert "x86_64 CPU, torch 1.2.3, commit abc1234." in text

    def test_sees_a_changed_number(self, folder):
        self.run(folder)
        path = folder / "README.md"
        path.write_text(path.read_text(encoding="utf-8").replace("4.00×", "5.00×"), encoding="utf-8")
        assert self.run(folder, "--check") == 1

    def test_names_a_missing_file(self, folder, capsys):
        (folder / "bench-portable.json").unlink()
        assert self.run(folder) == 1
        assert "bench-portable.json is missing" in capsys.readouterr().err
        assert (folder / "README.md").read_text(encoding="utf-8") == README
        assert self.run(folder, "--missing-ok") == 0

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("<!-- end: compare -->", "", "exactly one <!-- begin: compare -->"),
            ("begin: portable", "begin: nothing", "section 'nothing'"),
        ],
    )
    def test_names_a_broken_section(self, folder, capsys, old, new, message):
        (folder / "README.md").write_text(README.replace(old, new), encoding="utf-8")
        assert self.run(folder) == 1
        assert message in capsys.readouterr().err

    def test_names_a_file_of_another_form(self, folder, capsys):
        (folder / "compare-tiny-wan.json").write_text("{}")
        assert self.run(folder) == 1
        assert "compare-tiny-wan.json is not what section 'compare' expects: KeyError" in capsys.readouterr().err

    def test_benchmarks_are_read_as_they_are_written(self):
        from fastdiff.bench import breakdown, kernels, record, rivals

        assert readme_bench.DENSE == rivals.DENSE
        assert readme_bench.REORDER == kernels.REORDER
        assert readme_bench.PARTS == breakdown.PARTS
        assert readme_bench.moved(self.RECORD) == record.moved_bytes(self.RECORD) == 8 * 64 * 2 * 16 * 4

    def test_kernels(self):
        others = {"kernel": "flash SDPA", "milliseconds": 4.0}
        copies = {"kernel": readme_bench.REORDER, "density": 0.0, "tflops": 0.0, "milliseconds": 0.01}
        text = readme_tables.bench([self.RECORD, {**self.RECORD, **others}, {**self.RECORD, **copies}])
        assert "| **tiny: 64 tokens, 2 heads of 16, float32, forward** |" in text
        assert "| torch SDPA | 1.000 | 8.00 (0.50) | 0.50× | 0.25 |" in text
        assert f"| {readme_bench.REORDER} |  | 0.01 (0.50) |  | 7 GB/s |" in text

    def test_models(self):
        where = {"gpu": "G", "commit": "abc", "versions": {"torch": "1.2.3"}}
        parts = {"attention": 50.0, "linears": 30.0, "element-wise": 15.0, "reorder": 5.0}
        dense = {"model": "m", "what": "M, 9 frames", "tokens": 64, "layers": 40, "layers_timed": 4, "mode": "eager"}
        dense |= {"attention": "dense, diffusers default", "density": 1.0, "milliseconds": 100.0, "spread": 1.0}
        dense |= {"peak_gib": 30.25, "breakdown": parts, "plan_milliseconds": None, **where}
        sparse = {**dense, "attention": "radial, decay 0.123456", "milliseconds": 50.0, "plan_milliseconds": 12.5}
        text = readme_tables.models([dense, sparse])
        assert "| **M, 9 frames: 64 tokens, 40 layers, scaled from 4** |" in text
        assert "| dense, diffusers default | eager | 1.000 | 100 (1.00) | 1.00× | 30.2 | 50.0 | 30.0 | 15.0 |" in text
        assert "| radial, decay 0.123 | eager | 1.000 | 50.0 (1.00) | 2.00× |" in text
        assert text.endswith("G, torch 1.2.3, commit abc.")
        whole = {**dense, "mode": "compiled", "layers_timed": 40, "milliseconds": 80.0}
        text = readme_tables.models([dense, whole, {**whole, "milliseconds": 40.0}])
        assert text.count("| **M, 9 frames: 64 tokens, 40 layers** |") == text.count("| 2.50× |") == 1

    def test_fidelity(self):
        measured = {"psnr": {"mean": 24.12, "std": 2.04}, "ssim": {"mean": 0.917, "std": 0.1}, "recovered": 0.875}
        cell = {"label": "clear", "dense_share": 0.25, "target": 0.3}
        found = {
            "num_frames": 1,
            "height": 512,
            "width": 256,
            "grid": "1x64x32",
            "text_tokens": 64,
            "heads": 4,
            "head_dim": 32,
            "dense": {"recovered": 1.0},
            "other_seed": measured,
            "cells": [
                {**cell, "density": 0.288, **measured},
                {**cell, "target": 0.1, "floor": 0.152},
                {**cell, "label": "paro", "target": 0.1, "floor": None},
            ],
        }
        report = {"seed": 0, "gpu": "G", "commit": "abc", "versions": {"torch": "1.2.3"}}
        report |= {"plan": {"densities": [0.1, 0.3], "prompts": 16, "steps": 12}, "pipelines": {"tiny-flux": found}}
        text = readme_tables.fidelity(report)
        assert "| clear | first 25 % | floor 0.15 | 0.29: 24.1 ± 2.0 dB, 0.92, 88 % |" in text
        assert "| paro | first 25 % | — | not run |" in text
        assert "**tiny-flux**, 512×256, tokens 1×64×32 and 64 of text" in text
        assert "other seeds: 24.1 ± 2.0 dB, 0.92, 88 %." in text

    def test_a_file_without_a_section(self, folder, capsys):
        self.run(folder)
        (folder / "fidelity.json").write_text("{}")
        text = (folder / "README.md").read_text(encoding="utf-8")
        text = text.replace("<!-- begin: fidelity -->", "").replace("<!-- end: fidelity -->", "")
        (folder / "README.md").write_text(text, encoding="utf-8")
        assert self.run(folder) == 1
        assert "exactly one <!-- begin: fidelity -->" in capsys.readouterr().err
