"""The figures in README.md and docs/speed.md are those of one run of tools/bench.py, and of no hand."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tools'))

import make_tables  # noqa: E402
import speed_tables  # noqa: E402

FIGURES = json.loads((ROOT / 'docs/speed.json').read_text(encoding='utf-8'))
TABLES = [(document, rows) for document in ('README.md', 'docs/speed.md') for rows in make_tables.TABLES[document]
          if rows.__module__ == speed_tables.__name__]


def row(framework, case, dtype, name, route=None):
    """A row of docs/speed.json."""
    found, = (one for one in FIGURES['cases'] if (one['framework'], one['case'], one['dtype']) == (framework, case, dtype))
    return next(one for one in found['rows'] if (one['name'], one['route']) == (name, route))


def table(document, marker):
    """{first cell: the other cells} of a table."""
    text = (ROOT / document).read_text(encoding='utf-8')
    block = re.search(f'<!-- begin {marker}:.*?-->\n(.*?)<!-- end {marker} -->', text, re.DOTALL).group(1)
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in block.splitlines()]
    return {first: rest for first, *rest in cells}


def rounded(text):
    """A number and half a unit of its last place."""
    return pytest.approx(float(text), abs=0.5 * 10 ** -len(text.partition('.')[2]))


@pytest.mark.parametrize('cell, where', [
    ('`novograd` in MXNet', ('mxnet', 'gluon_optim:novograd', 'Trainer')),
    ('`adamw` in MXNet', ('mxnet', 'gluon_optim:adamw', 'Trainer')),
    ('`novograd` in PyTorch', ('torch', 'gluon_optim.torch:novograd')),
    ('`adamw` in PyTorch', ('torch', 'gluon_optim.torch:adamw')),
    ('torch fused AdamW', ('mxnet', 'torch_fused:adamw')),
])
def test_the_table_of_the_readme_shows_the_medians_of_the_run(cell, where):
    ms, floor, fused = table('README.md', 'speed')[cell]
    found = row(where[0], 'resnet50', 'float32', *where[1:])
    assert found['ms']['median'] == rounded(ms)
    assert found['times_floor'] == rounded(floor)
    assert found['times_torch_fused_adamw'] == rounded(fused)


@pytest.mark.parametrize('marker, framework, cases', [
    ('pytorch', 'torch', ('resnet50', '2000')), ('jax', 'jax', ('resnet50', '200')), ('onnx', 'onnx', ('resnet50', '200'))])
def test_the_table_of_a_framework_has_all_of_its_rows(marker, framework, cases):
    found = table('docs/speed.md', marker)
    names = {one['name'] for case in FIGURES['cases'] if case['framework'] == framework and case['dtype'] == 'float32'
             for one in case['rows']}
    assert len(found) == len(names) + 2  # the head, and the line below it
    family = {'torch': 'gluon_optim.torch', 'jax': 'gluon_optim.optax', 'onnx': 'gluon_optim.onnx'}[framework]
    for rule in ('adamw', 'novograd', 'lamb', 'sgd_torch'):
        cells = found[f'**{rule}**']
        for case, (ms, fused, *best) in zip(cases, (cells[:len(cells) // 2], cells[len(cells) // 2:])):
            measured = row(framework, case, 'float32', f'{family}:{rule}')
            assert (measured['ms']['median'], measured['times_torch_fused_adamw']) == (rounded(ms), rounded(fused))
            if framework == 'jax':
                other = row(framework, case, 'float32', f'optax:{rule.replace("_torch", "")}')
                assert [measured['ms']['median'] / other['ms']['median']] == [rounded(one) for one in best]
            else:
                assert [measured['times_best_other']] * (framework == 'torch') == [rounded(one) for one in best]


def test_all_figures_are_of_one_run_that_is_described():
    facts = FIGURES['facts']
    assert re.fullmatch(r'\d{4}-\d\d-\d\d', facts['date']) and facts['cpu'] and facts['cores'] and facts['versions']['mxnet']
    assert {'mxnet', 'torch', 'jax', 'onnx'} == {case['framework'] for case in FIGURES['cases']}
    assert FIGURES['layouts'] and ('torch', 'bfloat16') in {(case['framework'], case['dtype']) for case in FIGURES['cases']}
    assert len({json.dumps(case['other_versions']) for case in FIGURES['cases']}) == 1
    text = (ROOT / 'docs/speed.md').read_text(encoding='utf-8')
    assert facts['date'] in text and facts['versions']['mxnet'] in text
    assert '/bin/' not in json.dumps(FIGURES)  # names no path of the machine


@pytest.mark.parametrize('document, rows', TABLES, ids=lambda value: getattr(value, '__name__', value))
def test_a_figure_that_is_changed_by_hand_is_noticed(document, rows):
    text = (ROOT / document).read_text(encoding='utf-8')
    assert make_tables.updated(text, [rows], document) == text
    begin = text.index(f'<!-- begin {rows.__name__}')
    place = text.index('-->', begin) + re.search(r'\d(?!.*\d.*<!-- end)', text[text.index('-->', begin):]).start()
    changed = text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1:]
    assert changed != text
    assert make_tables.updated(changed, [rows], document) == text


def test_make_tables_refuses_a_readme_that_was_edited(tmp_path):
    """The program itself, on a copy."""
    for name in ('tools', 'docs'):
        shutil.copytree(ROOT / name, tmp_path / name)
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    ms = table('README.md', 'speed')['`adamw` in MXNet'][0]
    text = text.replace(f'| `adamw` in MXNet | {ms} |', '| `adamw` in MXNet | 0.01 |')
    (tmp_path / 'README.md').write_text(text, encoding='utf-8')
    done = subprocess.run([sys.executable, '-W', 'ignore', str(tmp_path / 'tools/make_tables.py'), '--check'],
                          env=dict(os.environ, PYTHONPATH=str(ROOT)), stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, 'README.md: out of date: run python tools/make_tables.py\n')
