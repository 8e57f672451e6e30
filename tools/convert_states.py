#!/usr/bin/env python
"""Write optimizer states for another program: the same as `gluon-optim convert`.

    python tools/convert_states.py run.states --params net.params --to torch -o optimizer.pt
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gluon_optim.cli import main  # found in this checkout, installed or not

if __name__ == '__main__':
    sys.exit(main(['convert', *sys.argv[1:]]))
