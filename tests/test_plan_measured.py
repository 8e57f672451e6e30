"""What gluon-optim plan says, against processes of real clusters: their memory, their messages, and a checkpoint's size."""
import json
import os
import re
import sys
import time
from pathlib import Path

import pytest

mx = pytest.importorskip('mxnet')

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / 'tests'), str(ROOT / 'tools')]
import cluster  # noqa: E402
from contract_nets import environment  # noqa: E402

import gluon_optim as go  # noqa: E402
from gluon_optim import rules  # noqa: E402
from gluon_optim.rules.planning import STATUS, Setting, plan  # noqa: E402

LONG = bool(os.environ.get('GLUON_OPTIM_SERVERS'))  # five minutes: three sizes, up to 2 GB of memory
SIZES = (5000000, 20000000, 50000000) if LONG else (10000000,)
CASES = {'adamw': {}, 'novograd': {}, 'sgd_torch': {'momentum': 0.9}} if LONG else {'adamw': {}}
BOUND = 10000000  # so that novograd's tensors are not cut
TENSORS = 10
# otherwise the C library keeps what is freed, as long as it pleases
EXACT = {'MALLOC_MMAP_THRESHOLD_': '65536', 'OMP_NUM_THREADS': '1'}
pytestmark = pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs /proc')


def trained(look, params, optimizer, arguments, dtype='float32', servers=1, updates=True, bound=BOUND, **variables):
    """``look(cluster)``, when two workers have trained."""
    job = dict(optimizer=optimizer, arguments=arguments, params=params, tensors=TENSORS, dtype=dtype, updates=updates)
    command = [sys.executable, str(ROOT / 'tests/plan_runs.py'), json.dumps(job)]
    variables = environment(**EXACT, MXNET_KVSTORE_BIGARRAY_BOUND=str(bound), **variables)
    for start in range(cluster.STARTS):
        with cluster.Cluster(command, 2, servers, variables) as running:
            try:
                running.wait_for('trained', ['worker0', 'worker1'], deadline=300)
            except cluster.ClusterError:
                if start == cluster.STARTS - 1 or not running.lost_a_port():
                    raise
            else:
                time.sleep(0.5)  # until servers have freed what they sent
                return look(running)


def memory(running):
    """Bytes in memory, now and at most, by process."""
    texts = {name: Path(f'/proc/{process.pid}/status').read_text() for name, process in running.processes.items()}
    return {name: [int(re.search(rf'{key}:\s+(\d+) kB', text)[1]) * 1024 for key in ('VmRSS', 'VmHWM')]
            for name, text in texts.items() if name != 'scheduler'}


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
@pytest.mark.parametrize('name', CASES)
def test_memory(name, dtype):
    arguments = dict(CASES[name], multi_precision=dtype == 'float16')
    trained(memory, 16 * TENSORS, name, arguments, dtype)  # kernels are compiled in it
    before = trained(memory, 16 * TENSORS, name, arguments, dtype)
    rule = rules.get(name)
    for params in SIZES:
        after = trained(memory, params, name, arguments, dtype)
        h = rule.hyperparameters(**CASES[name])
        found = plan(Setting(rule, h, params, TENSORS, dtype, dtype == 'float16', workers=2, servers=1, bound=BOUND))
        for process in after:
            planned = found.server if process == 'server0' else found.worker
            kept = sum(planned.kept.values())
            now, most = (b - a for a, b in zip(before[process], after[process]))
            print(f'{name} {dtype} {params} {process}: {kept / 1e6:.1f} MB planned, {now / 1e6:.1f} now, {most / 1e6:.1f} at most')
            assert now == pytest.approx(kept, rel=0.05), (process, params)
            assert most < 1.05 * (kept + planned.in_flight), (process, params)


@pytest.mark.parametrize('updates', [True, False])
def test_messages_and_bytes_of_a_step(updates):
    """As MXNet logs them; all tensors are cut in two parts."""
    bound, params = 100, 1600
    log = trained(lambda running: running.printed('worker0', 'stderr'), params, 'adamw', {}, servers=2, updates=updates,
                  bound=bound, PS_VERBOSE='2')
    rule = rules.get('adamw')
    found = plan(Setting(rule, rule.hyperparameters(), params, TENSORS, workers=2, servers=2, updates=updates, bound=bound)).worker
    lines = [line for line in log.splitlines() if 'simple_app=0' in line and 'data_size=8 ' in line][-found.messages:]
    sent = [line for line in lines if 'request=1' in line]
    stamps = {re.search(r'timestamp=(\d+)', line)[1] for line in lines}
    assert len(sent) == found.messages / 2 and len(stamps) == TENSORS + 2 * updates   # every answer has its question here
    sizes = {line: int(re.findall(r'data_size=(\d+)', line)[1]) for line in lines}
    assert sum(sizes[line] for line in sent) == found.sent
    assert sum(sizes[line] for line in lines if 'request=0' in line) == found.received


@pytest.mark.parametrize('name, dtype, kept', [
    ('novograd', 'float32', False), ('adamw', 'float16', True), ('adamw', 'float16', 'kahan'), ('sgd', 'float16', True)])
def test_a_checkpoint_on_disk(name, dtype, kept, tmp_path):
    rule, params = rules.get(name), 300000
    given = {'momentum': 0.9} if name == 'sgd' else {}
    parameters = [mx.gluon.Parameter(f'p{i}_weight', shape=(params // 3,), dtype=dtype, init=mx.init.One()) for i in range(3)]
    for parameter in parameters:
        parameter.initialize()
    trainer = mx.gluon.Trainer(parameters, go.create(name, multi_precision=kept, **given), kvstore=None)
    for parameter in parameters:
        parameter.data()._fresh_grad = True
    trainer.step(1)
    go.save_checkpoint(tmp_path / 'run.safetensors', trainer=trainer)
    planned = sum(plan(Setting(rule, rule.hyperparameters(**given), params, 3, dtype, kept)).checkpoint.values())
    assert planned < (tmp_path / 'run.safetensors').stat().st_size < planned + 20000


def test_what_a_server_says_of_itself_has_the_planned_size():
    from gluon_optim.mxnet.distributed.protocol import status_size
    assert 4 * status_size(1000000) == STATUS
    assert 4 * status_size(100) == plan(Setting(rules.get('sgd_torch'), rules.get('sgd_torch').hyperparameters(), 8, 1, servers=1,
                                                bound=100)).worker.received - 32
