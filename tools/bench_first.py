"""How long it takes from `import` to the end of the first update: the case `first_step` of tools/bench.py.

Every figure comes from a new process. Cold: nothing that was compiled is kept from before. Warm: the next process, which finds
what the cold one has compiled. `framework` is what MXNet or PyTorch takes on its own: import, a net, a backward pass, and the
update of its own SGD; `ours` the rest: `import gluon_optim`, creating the optimizer, and its first update. The net has
360,600 parameters, so that the update runs on several threads.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import util

SIDE = 600
FRAMEWORKS = 'mxnet', 'torch'


def measure(options):
    """Figures of the optimizers in ``options``, as `--json` writes them: a row for each framework and rule."""
    from tqdm import tqdm

    from gluon_optim import rules  # here, because importing it is part of what is measured
    from gluon_optim.rules.runtimes import runs_on
    pairs = [(framework, rule) for framework in FRAMEWORKS
             if framework in options.framework and util.find_spec(framework) for rule in options.optimizers
             if framework == 'mxnet' or runs_on(rules.get(rule), framework)]
    return [row(*pair) for pair in tqdm(pairs, desc='first_step', disable=None, leave=False)]


def row(framework, rule):
    with tempfile.TemporaryDirectory() as folder:
        return dict(framework=framework, rule=rule, cold=in_process(framework, rule, folder),
                    warm=in_process(framework, rule, folder))


def in_process(framework, rule, folder):
    """Seconds and processor seconds of a first update in a new process that keeps compiled code in ``folder``."""
    environment = dict(os.environ, GLUON_OPTIM_CACHE=f'{folder}/kernels', NUMBA_CACHE_DIR=f'{folder}/numba')
    done = subprocess.run([sys.executable, '-W', 'ignore', __file__, framework, rule], env=environment, text=True,
                          stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


class Clock:
    """The seconds of parts, and the processor's: on a busy machine only these mean much."""

    def __init__(self):
        self.parts, self._last = {}, (time.perf_counter(), time.process_time())

    def stop(self, part):
        """What has passed since the last call is ``part``."""
        now = time.perf_counter(), time.process_time()
        seconds, cpu = (after - before for before, after in zip(self._last, now))
        self.parts[part], self._last = dict(seconds=seconds, cpu=cpu), now


def first_update_in_mxnet(rule, clock):
    import mxnet as mx
    from mxnet import autograd, gluon

    def backward():
        net = gluon.nn.Dense(SIDE, in_units=SIDE)
        net.initialize()
        with autograd.record():
            loss = net(mx.nd.ones((1, SIDE))).sum()
        loss.backward()
        mx.nd.waitall()
        return net.collect_params()

    def update(parameters, optimizer):
        gluon.Trainer(parameters, optimizer, kvstore=None).step(1)
        mx.nd.waitall()

    update(backward(), 'sgd')
    parameters = backward()
    clock.stop('framework')
    import gluon_optim as go
    update(parameters, go.create(rule))
    clock.stop('ours')


def first_update_in_torch(rule, clock):
    import torch

    def backward():
        net = torch.nn.Linear(SIDE, SIDE)
        net(torch.ones(1, SIDE)).sum().backward()
        return net.parameters()

    torch.optim.SGD(backward(), lr=0.1).step()
    parameters = backward()
    clock.stop('framework')
    sys.modules['mxnet'] = None  # whoever uses PyTorch need not have it
    import gluon_optim as go
    go.torch.create(rule, parameters).step()
    clock.stop('ours')


def child(framework, rule):
    clock = Clock()
    globals()[f'first_update_in_{framework}'](rule, clock)
    print(json.dumps(clock.parts))


def table(rows):
    """The figures as text."""
    lines = ['first update, seconds (processor seconds)', f'{"":32}{"framework":>16}{"ours, cold":>16}{"ours, warm":>16}']
    for one in rows:
        parts = one['cold']['framework'], one['cold']['ours'], one['warm']['ours']
        cells = ''.join(f'{part["seconds"]:8.2f} ({part["cpu"]:5.2f})' for part in parts)
        lines.append(f'{one["framework"] + " " + one["rule"]:32}{cells}')
    return '\n'.join(lines)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='One first update in this process, as JSON. tools/bench.py --case first_step '
                                     'compares them, cold and warm.')
    parser.add_argument('framework', choices=FRAMEWORKS)
    parser.add_argument('rule')
    child(**vars(parser.parse_args()))
