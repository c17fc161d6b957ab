"""`python -m interflow_vision` is the command `interflow`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
