"""`fastdiff bench models` into results/bench-models.json. Takes its options."""

import sys

from fastdiff.cli import main

sys.exit(main(["bench", "models", "--output", "results/bench-models.json", *sys.argv[1:]]))
