"""`python -m opdtheory`."""

import sys

from opdtheory.cli import main

if __name__ == "__main__":
    sys.exit(main())
