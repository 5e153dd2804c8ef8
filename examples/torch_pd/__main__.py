"""`python -m torch_pd`, with this folder's parent on the path."""

import sys

from .driver import main

if __name__ == "__main__":
    sys.exit(main())
