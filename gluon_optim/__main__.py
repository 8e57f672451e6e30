"""``python -m gluon_optim``: the command `gluon-optim`."""
import sys

from .cli import main

sys.exit(main())
