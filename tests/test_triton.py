"""Triton kernels without a GPU: run by Triton's interpreter, and compiled for two of them. tools/gpu_check.py runs them on one."""
import json
import os
import pathlib
import subprocess
import sys

import pytest
from conversion_runs import NAMES

pytest.importorskip('torch')
pytest.importorskip('triton')
pytest.importorskip('numba')

HERE = pathlib.Path(__file__).parent
SUMS = ('lamb', 'lans', 'larc', 'lars', 'novograd', 'sngd')   # whose sums are accumulated in another order


def results(*arguments):
    path = os.pathsep.join([str(HERE), *sys.path])
    done = subprocess.run([sys.executable, '-W', 'ignore', str(HERE / 'triton_runs.py'), *arguments], capture_output=True,
                          text=True, timeout=900, env=dict(os.environ, PYTHONPATH=path))
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize('dtype, names', [
    ('float32', NAMES), ('float64', ['adamw', *SUMS]), ('float16', ['adamw', 'adam', 'novograd', 'lamb']),
    ('kahan-float16', ['adamw', 'sgd_torch', 'novograd']), ('kahan-bfloat16', ['adamw', 'sgd_torch', 'novograd'])])
def test_every_rule_is_what_it_is_on_the_cpu(dtype, names):
    """Bit for bit, but for sums: those are accumulated in single precision (double for float64), in another order."""
    found = results(dtype, *(name for name in names if name in NAMES))
    assert [row['name'] for row in found] == [name for name in names if name in NAMES]
    for row in found:
        assert row['equal'] or row['name'] in SUMS, row
        assert row['far'] <= {'float64': 1e-15, 'kahan-bfloat16': 2 ** -16}.get(dtype, 5e-7), row   # whose last bits are larger


def test_counts_on_the_device_give_the_same_steps():
    for row in results('counts', 'adamw', 'novograd', 'sgd_torch', 'radam', 'asgd'):
        assert row['far'] < 1e-14 and row['step'] == [4] * 5, row


def test_noise_is_what_it_is_on_the_cpu():
    """Bit for bit in single precision; in double precision logarithm, cosine and sine are another library's."""
    for row in results('noise', 'sgld', 'psgld'):
        assert row['equal'] or (row['dtype'] == 'float64' and row['far'] < 1e-14), row


def test_kernels_compile_for_gpus():
    """They contract no multiplication with an addition, and round divisions and roots correctly."""
    found = results('compile', 'adamw', 'novograd', 'psgld')
    passes = {'adamw': 1, 'novograd': 3, 'psgld': 1}   # with masters, and as many with compensations
    assert [(row['name'], row['capability']) for row in found] == [
        (name, capability) for name, number in passes.items() for capability in (80, 90) for _ in range(2 * number)]
    assert not any(row['approximate'] for row in found), found
