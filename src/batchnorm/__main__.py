"""`python -m batchnorm` is the command `batchnorm`."""

import sys

from batchnorm.cli import main

if __name__ == "__main__":
    sys.exit(main())
