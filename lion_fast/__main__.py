"""`python -m lion_fast`: the command line."""

import sys

from lion_fast.commands.main import main

sys.exit(main())
