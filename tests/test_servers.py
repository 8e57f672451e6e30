"""A real parameter server: scheduler, server and two workers as processes on this machine.

The server receives the optimizer as a pickle while it is still inside `import mxnet`.
"""
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

mx = pytest.importorskip('mxnet')

sys.path.insert(0, str(Path(__file__).parent))
from contract_nets import Run, environment, gradients  # noqa: E402

STEPS, WORKERS, TIMEOUT = 4, 2, 120

ROLE = 'import mxnet'  # scheduler and server live in here, until the workers have gone
WORKER = '''
import json, sys
import mxnet as mx
from contract_nets import Run, gradients
options = json.loads(sys.argv[1])
kvstore = mx.kv.create('dist_sync')
share = [0.25, 0.75][kvstore.rank]
run = Run(options['name'], options['arguments'], options['dtype'], kvstore=kvstore, update_on_kvstore=options['update_on_kvstore'],
          **options['attributes'])
# Without this wait MXNet may ask for the initial weights after the first gradients were sent: without an optimizer on the
# server, it would get their sum for weights.
run.trainer._init_kvstore()
run.trainer._init_params()
mx.nd.waitall()
for t in range(options['steps']):
    run.step([share * g for g in gradients(t)])
kvstore._barrier()
weights = {name: [str(array.dtype), array.tobytes().hex()] for name, array in run.weights().items()}
counts = None if options['update_on_kvstore'] else [run.optimizer.num_update, sorted(run.optimizer.update_counts().items())]
print(json.dumps([kvstore.rank, weights, counts]))
sys.stdout.flush()
'''


def free_port():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


class Cluster:
    """Starts all processes; whatever happens, none is left."""

    def __init__(self, options):
        shared = dict(DMLC_PS_ROOT_URI='127.0.0.1', DMLC_PS_ROOT_PORT=str(free_port()), DMLC_NUM_SERVER='1',
                      DMLC_NUM_WORKER=str(WORKERS), DMLC_INTERFACE='lo', DMLC_NODE_HOST='127.0.0.1', OMP_NUM_THREADS='1')
        self.processes = []
        for role in ['scheduler', 'server', *['worker'] * WORKERS]:
            code = WORKER if role == 'worker' else ROLE
            process = subprocess.Popen(
                [sys.executable, '-c', code, json.dumps(options)], env=environment(DMLC_ROLE=role, **shared),
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
            process.role = role
            self.processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def results(self):
        """What the workers found, by rank. A process that dies ends the wait for the others."""
        end = time.monotonic() + TIMEOUT
        while any(process.poll() is None for process in self.processes):
            dead = [process for process in self.processes if process.poll() not in (None, 0)]
            if dead or time.monotonic() > end:
                for process in self.processes:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
                told = [f'{p.role} {p.returncode}: {"".join(p.communicate())}' for p in self.processes]
                pytest.fail('the cluster ' + ('lost a process' if dead else 'took too long') + '\n' + '\n'.join(told))
            time.sleep(0.05)
        outputs = {process: process.communicate() for process in self.processes}
        answers = [json.loads(out.splitlines()[-1]) for process, (out, _) in outputs.items() if process.role == 'worker']
        return sorted(answers), {process.role: err for process, (_, err) in outputs.items()}


def alone_weights(arguments, dtype, attributes):
    alone = Run('novograd', arguments, dtype, **attributes)
    for t in range(STEPS):
        alone.step(gradients(t))
    return {name: [str(array.dtype), array.tobytes().hex()] for name, array in alone.weights().items()}


@pytest.mark.parametrize('update_on_kvstore, dtype, attributes', [
    (True, 'float32', {}), (True, 'float16', {}), (False, 'float32', {}), (True, 'float32', {'lr_mult': 0.5, 'wd_mult': 3.0}),
], ids=['on the server', 'on the server, with masters', 'on the workers', 'on the server, with multipliers'])
def test_training_on_a_parameter_server(update_on_kvstore, dtype, attributes):
    """Bit-equal to one process that is given the sum of the workers' gradients."""
    arguments = dict(learning_rate=0.0625, wd=0.125, multi_precision=dtype == 'float16')
    options = dict(name='novograd', arguments=arguments, dtype=dtype, update_on_kvstore=update_on_kvstore, steps=STEPS,
                   attributes=attributes)
    expected = alone_weights(arguments, dtype, attributes)
    with Cluster(options) as cluster:
        answers, errors = cluster.results()
    assert [rank for rank, _, _ in answers] == list(range(WORKERS))
    for _, weights, counts in answers:
        assert weights == expected, errors['server']
        if not update_on_kvstore:
            assert counts == [STEPS, [[i, STEPS] for i in range(len(expected))]]
    assert 'Traceback' not in errors['server'], errors['server']
