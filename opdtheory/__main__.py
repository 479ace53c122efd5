"""`python -m opdtheory`."""

import os
import sys

if __name__ == "__main__":
    # `python -m` looks for modules in the working directory first, where a loss may be in a file named copy.py or
    # torch.py. Only a package that lies there itself needs that.
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if sys.path[0] == os.getcwd() != package:
        sys.path.append(sys.path.pop(0))

    from opdtheory.cli import main

    sys.exit(main())
