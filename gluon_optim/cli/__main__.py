"""``python -m gluon_optim.cli``."""
import sys

from .main import main

sys.exit(main())
