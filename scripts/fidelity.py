"""Measures how near each method stays to dense attention on the embedded pipelines: results/fidelity.json and .png.

    python scripts/fidelity.py                       # a GPU, some minutes
    python scripts/fidelity.py --seconds 400         # starts no cell after that; what is done stays
    python scripts/fidelity.py --resume              # goes on where the file ends
    python scripts/fidelity.py --smoke --out build   # a CPU: tiny sizes and two prompts, nothing to publish

Every pipeline runs all prompts in one batch, each with a seed of its own: dense, dense with other seeds (the
yardstick), and each method at each density, with the first quarter of the steps dense and without. A density below
a method's floor at that size is not run; the floor stands in its place. PARO is calibrated on other prompts.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fidelity_bench import Bench, Entry, Plan
from fidelity_plot import draw

from fastdiff.commands.pipelines import device_and_dtype
from fastdiff.measure import report
from fastdiff_kernels import FastDiffError

log = logging.getLogger("fidelity")
ROOT = Path(__file__).resolve().parent.parent
# How far the seeds of the yardstick are from the measured ones.
OTHER_SEEDS = 1000
# Numbers of one file are of the same:
MUST_AGREE = ("seed", "plan", "commit", "device", "gpu", "versions")

# Blocks of 32 tokens, since grids of some thousand tokens have few blocks.
ENTRIES = (
    Entry("radial", "radial", {"block_size": 32}),
    Entry("neighborhood", "neighborhood", {"block_size": 32}),
    Entry("clear", "clear", {"block_size": 32}),
    Entry("paro", "paro"),
    Entry("agent", "agent", {"steps": (0.0, 1.0)}),
    # As it was published: agents in the early steps alone.
    Entry("agent, early", "agent", {"steps": (0.0, 0.4)}, shares=(0.0,)),
)
FULL = Plan(
    {
        # Radial needs many frames to reach low densities.
        "tiny-wan": {"num_frames": 81, "height": 128, "width": 128},
        "tiny-flux": {"height": 512, "width": 512},
        "tiny-sd": {"height": 256, "width": 256},
    },
    densities=(0.1, 0.2, 0.3, 0.5),
    shares=(0.25, 0.0),
    steps=12,
    prompts=16,
)
SMOKE = Plan(
    {
        "tiny-wan": {"num_frames": 17, "height": 64, "width": 64},
        "tiny-flux": {"height": 128, "width": 128},
        "tiny-sd": {"height": 64, "width": 64},
    },
    densities=(0.6,),
    shares=(0.5,),
    steps=2,
    prompts=2,
)


class Unfit(Exception):
    """A file that the run cannot go on with, in one line."""


class Record:
    """The file of results, written anew after each cell.

    Args:
        path: Where it stands.
        conditions: What all its numbers depend on.
        resume: Whether to go on with the file that is there.

    Raises:
        Unfit: If that file was made under other conditions.
    """

    def __init__(self, path: Path, conditions: dict[str, Any], resume: bool):
        self.path = path
        self.data = report.plain({**conditions, "pipelines": {}})
        if resume and path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
            unlike = [name for name in MUST_AGREE if old.get(name) != self.data.get(name)]
            if unlike:
                raise Unfit(f"{path} was made with other {', '.join(unlike)}; leave --resume out, or run as it was.")
            self.data = old

    def pipeline(self, model: str) -> dict[str, Any]:
        return self.data["pipelines"].setdefault(model, {"cells": []})

    def has(self, model: str, entry: Entry, density: float, share: float) -> bool:
        key = (entry.label, density, share)
        cells = self.pipeline(model)["cells"]
        return any((cell["label"], cell["target"], cell["dense_share"]) == key for cell in cells)

    def write(self) -> None:
        report.write_json(self.path, self.data)


def cells(plan: Plan, chosen: list[str]) -> Iterator[tuple[Entry, float, float]]:
    """Entry, density and share of dense steps; those of one config follow each other."""
    for entry in ENTRIES:
        for density in plan.densities if entry.method in chosen else ():
            for share in entry.shares or plan.shares:
                yield entry, density, share


def run(model: str, plan: Plan, record: Record, options: argparse.Namespace, late: Late, folder: Path) -> int:
    """All cells of one pipeline that are not on record yet; returns how many failed."""
    todo = [cell for cell in cells(plan, options.methods) if not record.has(model, *cell)]
    if not todo or late():
        return 0
    log.info("%s: loading, dense samples", model)
    bench = Bench(model, plan, options.seed, options.device)
    found = record.pipeline(model)
    found |= bench.conditions() | {"dense": bench.recovery(bench.dense)}
    if "other_seed" not in found:
        found["other_seed"] = bench.measure(bench.samples(options.seed + OTHER_SEEDS))
        log.info("%s: dense %.0f %% obeyed, other seeds %.1f dB", model, *figures(found))
    record.write()
    config, config_of, failed = None, None, 0
    for entry, density, share in todo:
        if late():
            break
        began = time.perf_counter()
        cell = {"label": entry.label, "method": entry.method, "target": density, "dense_share": share}
        try:
            if config_of != (entry, density):
                config, config_of = bench.config(entry, density, folder), (entry, density)
            with bench.attention(config, share) as sparse:
                cell |= sparse.to_dict(folder, Path()) | bench.measure(bench.samples(options.seed))
        except FastDiffError as error:
            config_of = None
            cell |= {"floor": floor_in(str(error)), "why": str(error)}
        except Exception:
            # One cell must not cost the others their time on the device; --resume tries it again.
            log.exception("%s, %s, density %g: left out", model, entry.label, density)
            config_of, failed = None, failed + 1
            continue
        cell["seconds"] = round(time.perf_counter() - began, 2)
        found["cells"].append(report.plain(cell))
        record.write()
        log.info("%s, %s, density %g, %.0f %% dense steps: %s", model, entry.label, density, 100 * share, brief(cell))
    return failed


def floor_in(message: str) -> float | None:
    """The lowest density that a method reaches, as its message tells it; None if it failed for another reason."""
    found = re.search(r"floor\b.*?\bwhich is (\d+(?:\.\d+)?)", message)
    return float(found[1]) if found else None


def figures(found: dict[str, Any]) -> tuple[float, float]:
    return 100 * found["dense"]["recovered"], found["other_seed"]["psnr"]["mean"]


def brief(cell: dict[str, Any]) -> str:
    if "why" in cell:
        return cell["why"]
    return (
        f"density {cell['density']:.3f}, {cell['psnr']['mean']:.1f} dB, {100 * cell['recovered']:.0f} % obeyed, "
        f"{cell['seconds']:.1f} s"
    )


class Late:
    """Whether the time is up.

    Args:
        seconds: From now on; None for no limit.
    """

    def __init__(self, seconds: float | None):
        self.end = None if seconds is None else time.monotonic() + seconds

    def __call__(self) -> bool:
        return self.end is not None and time.monotonic() > self.end


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder for fidelity.json and fidelity.png")
    parser.add_argument("--pipelines", nargs="+", choices=FULL.sizes, default=list(FULL.sizes))
    parser.add_argument("--methods", nargs="+", choices=methods(), default=methods())
    parser.add_argument("--prompts", type=int, help="in one batch; the memory of the device is the limit")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="start no cell after that many")
    parser.add_argument("--resume", action="store_true", help="keep what the file has")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--commit", help="for the record, where this is no git checkout")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO, stream=sys.stderr)
    late = Late(options.seconds)
    plan = SMOKE if options.smoke else FULL
    plan = plan if options.prompts is None else Plan(**{**vars(plan), "prompts": options.prompts})
    conditions = {
        "command": " ".join(["python scripts/fidelity.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "commit": options.commit or commit(),
        "seed": options.seed,
        "plan": asdict(plan),
        **report.environment(str(device_and_dtype(argparse.Namespace(device=options.device, dtype="auto"))[0])),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        record = Record(options.out / "fidelity.json", conditions, options.resume)
    except Unfit as error:
        log.error("%s", error)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        failed = sum(run(model, plan, record, options, late, Path(folder)) for model in options.pipelines)
    record.write()
    draw(record.data, options.out / "fidelity.png")
    return 1 if failed else 0


def methods() -> list[str]:
    return list(dict.fromkeys(entry.method for entry in ENTRIES))


def commit() -> str:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return git.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
