"""Write the tables of README.md that follow from the declarations of the optimizers; with --check, only compare.

    python tools/make_tables.py
"""
import argparse
import re
import sys
from pathlib import Path

import gluon_optim as go
from gluon_optim.conversions import FOREIGN

README = Path(__file__).resolve().parent.parent / 'README.md'


def optimizers():
    """One row per optimizer."""
    yield "| name | what it does | computes the same as | state per float32 weight | `to_torch(states, target='torch')` |"
    yield '|---|---|---|---|---|'
    for name in go.list_optimizers():
        info = go.optimizer_info(name)
        classes = ', '.join(f'`{foreign.path}`' for foreign in FOREIGN if foreign.rule == name and foreign.target == 'torch')
        equals = ', '.join(info.equals) or '(nothing else known)'
        yield f'| `{name}` | {info.summary} | {equals} | {memory(info.slots)} | {classes} |'


def memory(slots):
    """What a parameter's state takes with the default arguments, in words."""
    arrays = sum(slot.like == 'weight' for slot in slots)
    numbers = len(slots) - arrays
    words = [f'{4 * arrays} bytes'] * (arrays > 0) + [f'{numbers} per tensor'] * (numbers > 0)
    return ' + '.join(words) or 'none'


TABLES = {'optimizers': optimizers}


def updated(text):
    """``text`` with every table between its markers written anew; ValueError where a marker is missing."""
    for name, rows in TABLES.items():
        pattern = re.compile(f'(<!-- begin {name}[^>]*-->\n).*?(<!-- end {name} -->)', re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f'README.md must hold "<!-- begin {name} -->" and "<!-- end {name} -->" on lines of their own.')
        table = '\n'.join(rows()) + '\n'
        text = pattern.sub(lambda found, table=table: found.group(1) + table + found.group(2), text)
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='exit 1 if README.md is not up to date')
    check = parser.parse_args().check
    text = README.read_text(encoding='utf-8')
    new = updated(text)
    if check and new != text:
        print('README.md is not up to date: run python tools/make_tables.py', file=sys.stderr)
        return 1
    if not check:
        README.write_text(new, encoding='utf-8')
    return 0


if __name__ == '__main__':
    sys.exit(main())
