"""`python -m letkd` is the command `letkd`."""
import sys

from letkd.cli import main

if __name__ == '__main__': sys.exit(main())
