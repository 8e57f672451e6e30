"""Write the tables in README.md and in docs/ from the declarations in the code; with --check, only compare.

    python tools/make_tables.py
"""
import argparse
import re
import sys
from pathlib import Path

import speed_tables

import gluon_optim as go
from gluon_optim import rules
from gluon_optim.mapping.classes import EXACT, FOREIGN, mirrored, reason
from gluon_optim.rules.catalog import formula
from gluon_optim.schedules.catalog import SCHEDULES
from gluon_optim.schema import REQUIRED

ROOT = Path(__file__).resolve().parent.parent


def optimizers():
    """One row per optimizer."""
    yield "| name | what it does | computes the same as | state per float32 weight | `to_torch(states, target='torch')` |"
    yield '|---|---|---|---|---|'
    for name in go.list_optimizers():
        info = go.optimizer_info(name)
        classes = ', '.join(f'`{form.path}`' + ('' if form.labels[-1].name == EXACT else f' ({form.labels[-1].name})')
                            for form in FOREIGN if form.rule == name and form.target == 'torch')
        equals = ', '.join(info.equals) or '(none known)'
        yield f'| `{name}` | {info.summary} | {equals} | {memory(info.slots)} | {classes} |'


def memory(slots):
    """The size of a parameter's state with the default arguments, in words."""
    arrays = sum(slot.like == 'weight' for slot in slots)
    numbers = len(slots) - arrays
    words = [f'{4 * arrays} bytes'] * (arrays > 0) + [f'{numbers} per tensor'] * (numbers > 0)
    return ' + '.join(words) or 'none'


def conversions():
    """One row per optimizer and class of another project."""
    yield '| optimizer | `target` | class | result | conditions |'
    yield '|---|---|---|---|---|'
    for form in sorted(FOREIGN, key=lambda form: (form.rule, form.target)):
        yield '| ' + ' | '.join(conversion(form)) + ' |'


def conversion(form):
    """The cells of a row: optimizer, target, class, result, conditions."""
    *better, last = form.labels
    result = '; '.join([f'{label.name} if {label.when}' for label in better] + ['else ' * bool(better) + last.name])
    conditions = '; '.join(form.conditions(rules.get(form.rule)))
    return [f'`{form.rule}`', f"`'{form.target}'`", f'`{form.path}`', result, conditions]


def refused():
    """One row per optimizer without such a class."""
    yield '| optimizer | why |'
    yield '|---|---|'
    for name in sorted(set(go.list_optimizers()) - {form.rule for form in FOREIGN}):
        rule = rules.get(name)
        yield f"| `{name}` | {reason(rule)}{'' if mirrored(rule) else ' (no mirror)'} |"


def schedules():
    """One row per learning-rate schedule."""
    yield '| `go.lr_scheduler.` | rate of update t | PyTorch |'
    yield '|---|---|---|'
    for schedule in SCHEDULES:
        name = 'scaled' if schedule.__name__ == 'Scaled' else schedule.__name__  # a function makes it
        arguments = ', '.join(h.name if h.default is REQUIRED else f'{h.name}={h.default!r}' for h in schedule.hypers)
        lines = formula(schedule).split('\n\n')[0].splitlines()
        rate = '<br>'.join(f'`{" ".join(line.split())}`' for line in lines)
        yield f'| `{name}({arguments})` | {rate} | `{schedule.counterpart}` |'


TABLES = {'README.md': [optimizers, speed_tables.speed, speed_tables.accelerated, speed_tables.pytorch_in_short,
                        speed_tables.elsewhere_in_short],
          'docs/CONVERSIONS.md': [conversions, refused],
          'docs/SCHEDULES.md': [schedules],
          'docs/speed.md': [speed_tables.machine, speed_tables.resnet50, speed_tables.half, speed_tables.tensors,
                            speed_tables.layouts, speed_tables.pytorch, speed_tables.gpu, speed_tables.jax, speed_tables.onnx, speed_tables.first_step]}


def updated(text, tables, name):
    """``text`` with each of ``tables`` between its markers written anew; ValueError where a marker is missing."""
    for rows in tables:
        marker = rows.__name__
        pattern = re.compile(f'(<!-- begin {marker}[^>]*-->\n).*?(<!-- end {marker} -->)', re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f'{name} must hold "<!-- begin {marker} -->" and "<!-- end {marker} -->" on lines of their own.')
        table = '\n'.join(rows()) + '\n'
        text = pattern.sub(lambda found, table=table: found.group(1) + table + found.group(2), text)
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='exit with 1 if one of them is out of date')
    check = parser.parse_args().check
    stale = []
    for name, tables in TABLES.items():
        text = (ROOT / name).read_text(encoding='utf-8')
        new = updated(text, tables, name)
        if new != text:
            stale.append(name)
        if not check:
            (ROOT / name).write_text(new, encoding='utf-8')
    if check and stale:
        print(f'{", ".join(stale)}: out of date: run python tools/make_tables.py', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
