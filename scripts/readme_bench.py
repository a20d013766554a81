"""The README's tables of benchmarks: what `fastdiff bench` writes. Standard library only."""

from __future__ import annotations

import re
from typing import Any

from readme_text import significant, table, versions

# What fastdiff.bench calls the dense kernels of others, and its row that only copies.
DENSE = (
    "cuDNN SDPA", "flash SDPA", "efficient SDPA", "FlexAttention, dense", "FlashAttention-4, dense", "torch SDPA",
)  # fmt: skip
PARTS = ("attention", "linears", "element-wise", "reorder")
REORDER = "reorder: gather of q, k and v, scatter of the output"


def bench(records: list[dict[str, Any]]) -> str:
    """Kernels alone: what `fastdiff bench kernels` writes, one table for all shapes."""
    rows, shape = [], None
    first = {record["shape"]: place for place, record in reversed(list(enumerate(records)))}
    for record in sorted(records, key=lambda one: (first[one["shape"]], one["direction"] == "backward")):
        dense = fastest_dense(record, records)
        mine = (record["shape"], record["dtype"], record["direction"])
        if mine != shape:
            shape = mine
            size = f"{record['tokens']} tokens, {record['heads']} heads of {record['head_dim']}"
            rows.append([f"**{record['shape']}: {size}, {record['dtype']}, {record['direction']}**", *[""] * 4])
        time = f"{significant(record['milliseconds'])} ({significant(record['spread'])})"
        if record["kernel"] == REORDER:
            rows.append([record["kernel"], "", time, "", f"{moved(record) / record['milliseconds'] / 1e6:.0f} GB/s"])
            continue
        # Solved settings have more digits than anybody reads.
        kernel = re.sub(r"\d+\.\d{4,}", lambda number: f"{float(number[0]):.3f}", record["kernel"])
        gain = f"{dense / record['milliseconds']:.2f}×" if dense else ""
        rows.append([kernel, f"{record['density']:.3f}", time, gain, significant(record["tflops"])])
    head = ["kernel", "density", "ms, median (slowest − fastest)", "against dense", "TFLOP/s of computed tiles"]
    return table(head, rows) + "\n\n" + conditions(records)


def fastest_dense(record: dict[str, Any], records: list[dict[str, Any]]) -> float | None:
    """Milliseconds of the fastest dense kernel that ran the same shape, type and direction."""
    same = ("shape", "tokens", "heads", "head_dim", "dtype", "direction", "gpu")
    alike = (one for one in records if one["kernel"] in DENSE and all(one[name] == record[name] for name in same))
    return min((one["milliseconds"] for one in alike), default=None)


def moved(record: dict[str, Any]) -> int:
    """Bytes that a reorder reads and writes: four tensors, there and back."""
    size = {"float32": 4, "bfloat16": 2, "float16": 2}[record["dtype"]]
    return 8 * record["tokens"] * record["heads"] * record["head_dim"] * size


def conditions(records: list[dict[str, Any]]) -> str:
    """The machines and versions behind some records, each named once."""
    commits: dict[str, list[str]] = {}
    for record in records:
        found = commits.setdefault(f"{record['gpu'].replace('none, ', '')}, {versions(record['versions'])}", [])
        if record["commit"] not in (*found, "unknown"):
            found.append(record["commit"])
    return "; ".join(run + (f", commit {', '.join(found)}" if found else "") for run, found in commits.items()) + "."


def models(records: list[dict[str, Any]]) -> str:
    """One denoising forward of whole models: what `fastdiff bench models` writes, one table for all of them."""
    rows, default, head = [], None, None
    for record in records:
        if default is None or record["model"] != default["model"]:
            default = record
        if head != (head := (record["model"], record["layers_timed"])):
            some = "" if record["layers_timed"] == record["layers"] else f", scaled from {record['layers_timed']}"
            rows.append(
                [f"**{record['what']}: {record['tokens']} tokens, {record['layers']} layers{some}**", *[""] * 10]
            )
        gain = f"{default['milliseconds'] / record['milliseconds']:.2f}×"
        kernel = re.sub(r"\d+\.\d{4,}", lambda number: f"{float(number[0]):.3f}", record["attention"])
        plan = record["plan_milliseconds"]
        rows.append(
            [
                kernel,
                record["mode"],
                f"{record['density']:.3f}",
                f"{significant(record['milliseconds'])} ({significant(record['spread'])})",
                gain,
                f"{record['peak_gib']:.1f}",
                *(significant(record["breakdown"][part]) for part in PARTS),
                "" if plan is None else significant(plan),
            ]
        )
    columns = ["attention", "blocks", "density", "ms, median (slowest − fastest)", "against default", "peak GiB"]
    return table([*columns, *PARTS, "plan, once"], rows) + "\n\n" + conditions(records)
