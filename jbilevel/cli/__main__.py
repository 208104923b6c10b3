"""``python -m jbilevel.cli``."""

import sys

from jbilevel.cli import main

if __name__ == "__main__":
    sys.exit(main())
