"""SIGKILL at random instants: no checkpoint is ever damaged, none that was saved is lost, and the run is what it would have been.

GLUON_OPTIM_KILLS=500 kills as often as that; the default is small.
"""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('mxnet')

ROOT = Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get('GLUON_OPTIM_KILLS', '40'))


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL') or not hasattr(os, 'fork'), reason='needs fork and SIGKILL')
def test_a_run_that_is_killed_again_and_again(tmp_path):
    out = subprocess.run([sys.executable, str(ROOT / 'tests' / 'kill_runs.py'), str(tmp_path / 'run'), str(KILLS)],
                         env={**os.environ, 'PYTHONPATH': str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert out.returncode == 0, out.stderr
    found = json.loads(out.stdout)
    assert found['damaged'] == [] and found['lost'] == []
    assert found['resumed'] == found['straight'], f'after {found["steps"]} steps'
    # the next writer removes what a killed one left
    assert found['most leftovers'] <= 1 and found['in the middle'] >= KILLS // 10
