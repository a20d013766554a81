"""Puts records of `fastdiff bench` that were measured elsewhere into a file of results/, in place of older ones.

    python scripts/join_records.py results/bench-models.json outputs/bench-models.json

Records of a shape replace all of that shape; those of a model all of that model in the same mode. What the file has of
others stays. Then: python3 scripts/readme_tables.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fastdiff.commands.bench import MODES
from fastdiff.measure.report import write_json

Records = list[dict[str, Any]]


def groups(records: Records) -> dict[tuple[str, str | None], Records]:
    """The records by what was measured together: a shape, or a model in a mode."""
    found: dict[tuple[str, str | None], Records] = {}
    for record in records:
        name = record["shape"] if "shape" in record else record["model"]
        found.setdefault((name, record.get("mode")), []).append(record)
    return found


def joined(old: Records, new: Records) -> Records:
    """The records of both, those of one model side by side with its eager ones first, as tables want them."""
    all_groups = groups(old) | groups(new)
    names = list(dict.fromkeys(name for name, _ in all_groups))
    keys = sorted(all_groups, key=lambda key: (names.index(key[0]), key[1] is not None and MODES.index(key[1])))
    return [record for key in keys for record in all_groups[key]]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("into", type=Path, help="the file of results/")
    parser.add_argument("records", type=Path, nargs="+", help="files that `fastdiff bench` wrote, later ones win")
    options = parser.parse_args(arguments)
    records = json.loads(options.into.read_text(encoding="utf-8"))
    for path in options.records:
        new = json.loads(path.read_text(encoding="utf-8"))
        if new and records and ("shape" in new[0]) != ("shape" in records[0]):
            parser.error(f"{path} and {options.into} are not of the same benchmark: one has shapes, the other models.")
        records = joined(records, new)
    write_json(options.into, records)


if __name__ == "__main__":
    main()
