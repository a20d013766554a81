"""`python -m fastdiff` is the `fastdiff` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
