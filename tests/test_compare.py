"""examples/compare_optimizers.py: the comparison runs, and its table of settings misses no optimizer."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gluon_optim as go

pytest.importorskip('mxnet')
pytest.importorskip('sklearn')
pytest.importorskip('matplotlib')

EXAMPLES = Path(__file__).resolve().parent.parent / 'examples'
SCRIPT = EXAMPLES / 'compare_optimizers.py'


def compare(*arguments):
    environment = {**os.environ, 'PYTHONPATH': str(EXAMPLES.parent)}
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], env=environment, timeout=300,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_table_picture_and_losses_of_two_optimizers(tmp_path):
    picture, losses = tmp_path / 'losses.png', tmp_path / 'losses.json'
    shown = compare('--only', 'sgd_torch', 'adam', '--steps', '30', '--accuracy', '0.3', '--plot', picture, '--json', losses)
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr == ''  # no progress bar where there is no terminal
    header, *rows = shown.stdout.splitlines()
    assert header.startswith('optimizer') and {row.split()[0] for row in rows} == {'sgd_torch', 'adam'}
    assert picture.read_bytes().startswith(b'\x89PNG')
    for curve in json.loads(losses.read_text())['losses'].values():
        assert len(curve) == 30 and curve[-1] < 0.7 * curve[0]


def test_an_optimizer_that_misses_the_accuracy_is_named():
    shown = compare('--only', 'sngd', '--steps', '2', '--accuracy', '1', '--json', '-')
    assert shown.returncode == 1 and 'sngd' in shown.stderr
    assert json.loads(shown.stdout)['results'][0]['steps_to_accuracy'] is None


def test_every_optimizer_has_a_setting(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location('compare_optimizers', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(go.list_optimizers()) <= set(module.SETTINGS)
