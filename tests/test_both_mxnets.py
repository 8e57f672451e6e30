"""Runs that one version of MXNet begins and another goes on with.

GLUON_OPTIM_MXNET2=/path/to/python names the Python of an environment with MXNet 2.0, as `tools/test --mxnet 2` makes it.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip('mxnet')
sys.path.insert(0, str(Path(__file__).parent))
from contract_nets import NEWER, environment  # noqa: E402

OTHER = os.environ.get('GLUON_OPTIM_MXNET2')
if NEWER or not OTHER:
    pytest.skip('GLUON_OPTIM_MXNET2 names no Python with MXNet 2', allow_module_level=True)

CASES = {
    'novograd': dict(learning_rate=0.1, wd=0.1), 'adamw': dict(learning_rate=0.1, wd=0.1), 'lans': dict(learning_rate=0.1, wd=0.1),
    'sgd': dict(learning_rate=0.1, momentum=0.8, wd=0.1), 'lars': dict(learning_rate=0.1, momentum=0.8, eta=0.1),
    'lamb': dict(learning_rate=0.1, wd=0.1),
    # with decay and clipping together the versions compute something else
    'adam': dict(learning_rate=0.1, wd=0.5, clip_gradient=0.5), 'nag': dict(learning_rate=0.1, momentum=0.8, wd=0.5),
    'adagrad': dict(learning_rate=0.1, wd=0.5),
    'rmsprop': dict(learning_rate=0.1, wd=0.5, clip_gradient=0.5, centered=True), 'nadam': dict(learning_rate=0.1, wd=0.5),
}
PYTHONS = {'1.x': sys.executable, '2.x': OTHER}


def runs(version, jobs):
    """The weights that each job comes to on that version of MXNet."""
    process = subprocess.run([PYTHONS[version], str(Path(__file__).with_name('version_runs.py')), json.dumps(jobs)],
                             env=environment(), timeout=600, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.returncode == 0, process.stderr
    return [{key: np.array(values) for key, values in weights.items()} for weights in json.loads(process.stdout)]


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
@pytest.mark.parametrize('first, second', [('1.x', '2.x'), ('2.x', '1.x')])
def test_a_run_goes_on_as_it_would_have(first, second, dtype, tmp_path):
    """With weights, states, counts and the formula of the version that began it; tolerance in units of the last three updates."""
    def job(name, load, save, steps):
        return dict(name=name, arguments=dict(CASES[name], multi_precision=dtype == 'float16'), steps=steps, dtype=dtype,
                    load=load and str(tmp_path / load), save=save and str(tmp_path / save))

    names = [name for name in CASES if (name, first) != ('lars', '1.x')]
    begun = runs(first, [job(name, None, name, (0, 3)) for name in names])
    straight = runs(first, [job(name, None, None, (0, 6)) for name in names])
    resumed = runs(second, [job(name, name, None, (3, 6)) for name in names])
    for name, *weights in zip(names, begun, straight, resumed):
        for key, (start, expected, found) in {key: [one[key] for one in weights] for key in weights[0]}.items():
            moved = np.abs(expected - start).max()
            np.testing.assert_allclose(found, expected, rtol=1.01 / 1024 if dtype == 'float16' else 0, atol=2e-6 * moved,
                                       err_msg=f'{name} {key}')


def test_lars_of_mxnet_1_is_refused_by_that_of_mxnet_2(tmp_path):
    """It corrects its momentum by the last rate, which 2.0's does not keep."""
    job = dict(name='lars', arguments=CASES['lars'], dtype='float32', load=None, save=str(tmp_path / 'x'), steps=(0, 2))
    runs('1.x', [job])
    with pytest.raises(AssertionError, match='ValueError: The lars of MXNet 2.x keeps no rate from step to step'):
        runs('2.x', [dict(job, load=job['save'], save=None)])
