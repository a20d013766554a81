"""scripts/sanitize.py without a GPU: what it runs, and how it reads compute-sanitizer's reports."""

import sys
from pathlib import Path

import pytest

from fastdiff_kernels import Grid, RuleKind
from fastdiff_kernels.kernel_rule import BALL, DISC

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import sanitize

REPORTS = {
    "clean": ("ERROR SUMMARY: 0 errors", 0, True),
    "no hazards": ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, True),
    "errors": ("Invalid __global__ read of size 4 bytes\nERROR SUMMARY: 3 errors", 0, False),
    "hazards": ("RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)", 0, False),
    "a failed case": ("ERROR SUMMARY: 0 errors", 1, False),
    "no report": ("Device not supported", 0, False),
}


@pytest.mark.parametrize("name", REPORTS)
def test_reports_are_read(name, tmp_path, caplog):
    text, code, clean = REPORTS[name]
    lines = "\n".join(f'print("========= {line}")' for line in text.splitlines())
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!{sys.executable}\nimport sys\n{lines}\nsys.exit({code})\n")
    program.chmod(0o755)
    with caplog.at_level("INFO"):
        assert sanitize.examine(str(program), "memcheck", "portable forward") is clean
    assert text.splitlines()[0] in caplog.text or clean


def test_it_is_found_on_the_path_or_in_cudas_folder(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    assert sanitize.find_sanitizer() == str(program)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sanitize.find_sanitizer() == str(program)


def test_every_short_form_of_a_rule_is_run():
    kinds = {plan.kernel_rule.kind for plan, _ in sanitize.small_plans(Grid(2, 9, 13), 64)}
    assert kinds == {RuleKind.BOX, RuleKind.METRIC, RuleKind.BITS, DISC, BALL}
