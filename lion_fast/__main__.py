"""`python -m lion_fast`: the command line."""

import sys

from lion_fast.cli import main

sys.exit(main())
