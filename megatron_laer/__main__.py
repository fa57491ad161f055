"""Entry point of `python -m megatron_laer`, the command line in `tools.cli`."""

import sys

from megatron_laer.tools.cli import main

# Megatron's checkpoint writer starts processes that may import this module again.
if __name__ == "__main__":
    sys.exit(main())
