"""What an import loads, each in a process of its own, and that the Hugging Face `kernels` package is not hidden."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def loaded_by(code: str) -> set[str]:
    """Top-level modules in memory after running some code in the repository's root."""
    code += "\nimport sys; print(','.join({name.partition('.')[0] for name in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.strip().splitlines()[-1].split(","))


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import fastdiff", {"torch", "triton", "diffusers", "transformers", "gradio"}),
        ("import fastdiff; fastdiff.RadialConfig(); fastdiff.DenseSchedule(1); fastdiff.Grid", {"triton", "diffusers"}),
        ("import fastdiff; dir(fastdiff); fastdiff.apply; fastdiff.summary", {"triton", "diffusers", "gradio"}),
        ("import fastdiff_kernels", {"triton", "diffusers", "transformers", "fastdiff", "fastdiff_patches"}),
        ("import fastdiff_patches", {"torch", "diffusers", "fastdiff"}),
        ("import fastdiff_patches.families, fastdiff_patches.locate", {"triton", "diffusers", "fastdiff"}),
        ("import fastdiff_patches.marker", {"fastdiff", "gradio"}),
    ],
)
def test_an_import_leaves_out(code, absent):
    assert not loaded_by(code) & absent


def test_the_public_names_are_all_there():
    code = (
        "import fastdiff\n"
        "assert fastdiff.__all__ == sorted(fastdiff.__all__)\n"
        "assert set(fastdiff.__all__) <= set(dir(fastdiff))\n"
        "for name in fastdiff.__all__: getattr(fastdiff, name)\n"
        "import fastdiff.attn_processors, fastdiff.api, fastdiff.schedule\n"
        "assert all(callable(getattr(fastdiff, name)) for name in ('apply', 'remove', 'summary', 'processors'))"
    )
    assert "fastdiff" in loaded_by(code)


def test_no_package_of_ours_is_called_kernels():
    code = (
        "import importlib.util\n"
        "spec = importlib.util.find_spec('kernels')\n"
        f"assert spec is None or spec.origin is None or not spec.origin.startswith({str(ROOT)!r}), spec"
    )
    loaded_by(code)
    assert not any((ROOT / name / "__init__.py").exists() for name in ("kernels", "patches", "apps", "tests"))


def test_an_installed_kernels_package_is_found_from_the_root(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("found = True")
    loaded_by(f"import sys; sys.path.append({str(tmp_path)!r})\nimport kernels; assert kernels.found")
