"""`python -m bigkit` is `bigkit`, also where the folder of installed scripts is not on the PATH."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
