"""`fastdiff bench kernels` into results/: bench-kernels.json, or bench-portable.json with --cpu. Takes its options."""

import sys

from fastdiff.cli import main

name = "bench-portable.json" if "--cpu" in sys.argv else "bench-kernels.json"
sys.exit(main(["bench", "kernels", "--output", f"results/{name}", *sys.argv[1:]]))
