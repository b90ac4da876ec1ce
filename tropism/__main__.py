"""``python -m tropism``."""

import sys

from tropism.cli import main

if __name__ == "__main__":
    sys.exit(main())
