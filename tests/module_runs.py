"""Runs of `Module.fit`: straight, and killed with SIGKILL in the middle of an epoch and resumed, each in a process of its own.

    python module_runs.py FOLDER CASES

CASES is a JSON list of the keyword arguments of `make`. Prints what was found as a JSON list: for each case the facts of both
runs, and the epoch at which the second one was resumed.
"""
# ruff: noqa: NPY002  the global generators are what a checkpoint brings back
import hashlib
import json
import os
import signal
import sys
import warnings

import mxnet as mx
import numpy as np
from kill_runs import in_child, lines

import gluon_optim as go

EPOCHS, BATCHES, BATCH = 4, 3, 4


def symbol(dtype='float32', dropout=True):
    """Two dense layers with parameters of type ``dtype``, which compute in float32: MXNet has none in float16 on a CPU."""
    def dense(net, number, name):
        own = {each: mx.sym.Cast(mx.sym.var(f'{name}_{each}', dtype=dtype), 'float32') for each in ('weight', 'bias')}
        return mx.sym.FullyConnected(net, num_hidden=number, name=name, **own)

    net = mx.sym.BatchNorm(dense(mx.sym.var('data'), 6, 'fc1'), fix_gamma=False, name='norm')
    net = mx.sym.Dropout(net, p=0.5) if dropout else net
    return mx.sym.LinearRegressionOutput(dense(mx.sym.tanh(net), 3, 'fc2'), mx.sym.var('label'), name='out')


def data():
    random = np.random.RandomState(0)
    return mx.io.NDArrayIter(random.randn(BATCHES * BATCH, 5).astype('float32'), random.randn(BATCHES * BATCH, 3).astype('float32'),
                             BATCH, label_name='label')


def make(optimizer='adamw', arguments=None, contexts=1, kvstore='local', dtype='float32', accelerate=False, schedule=True,
         dropout=True, seed=1, fixed=None):
    """A Module as at the beginning of a run."""
    mx.random.seed(seed)
    np.random.seed(seed)
    module = mx.mod.Module(symbol(dtype, dropout), label_names=['label'], context=[mx.cpu(k) for k in range(contexts)],
                           fixed_param_names=fixed)
    module.bind(data().provide_data, data().provide_label)
    module.init_params(mx.init.Uniform(0.5))
    arguments = {'learning_rate': 0.02, 'wd': 0.01, **(arguments or {})}
    if schedule:
        arguments['lr_scheduler'] = mx.lr_scheduler.FactorScheduler(2, 0.8, base_lr=arguments['learning_rate'])
    if dtype == 'float16':
        arguments['multi_precision'] = True
    if accelerate:
        go.accelerate()
    module.init_optimizer(kvstore, optimizer, arguments)
    go.restore_builtins()
    return module


def fit(module, prefix, epochs=EPOCHS, begin=0, killed_in=None, callbacks=()):
    def batch_end(parameters):
        mx.nd.waitall()  # without it two equal runs on two contexts may differ: MXNet reads running statistics too early
        if parameters.epoch == killed_in and parameters.nbatch == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Parameters already initialized')
        module.fit(data(), eval_metric='mse', num_epoch=epochs, begin_epoch=begin, batch_end_callback=batch_end,
                   epoch_end_callback=[go.module_checkpoint(module, prefix), *callbacks])
    return module


def updater_of(module):
    return module._kvstore._updater if module._update_on_kvstore else module._updater


def facts(module, draw=True):
    """Everything that decides how a run continues, as text."""
    mx.nd.waitall()
    group, found = module._exec_group, {}
    for name, arrays in [*zip(group.param_names, group.param_arrays), *zip(group.aux_names, group.aux_arrays)]:
        found.update((f'{name} on {k}', digest(array)) for k, array in enumerate(arrays))
    if module._update_on_kvstore:
        for name, arrays in zip(group.param_names, group.param_arrays):
            stored = arrays[0].copy()
            module._kvstore.pull(name, stored)
            found[f'{name} in the kvstore'] = digest(stored)
    updater = updater_of(module)
    for key, state in updater.states.items():
        found.update((f'state {k} of {key}', digest(array)) for k, array in enumerate(flat(state)))
    optimizer = updater.optimizer
    for counts in optimizer._all_index_update_counts.values():
        for key, count in counts.items():
            if key in updater.states:
                found[f'count of {key}'] = max(count, found.get(f'count of {key}', 0))
    scheduler = optimizer.lr_scheduler
    found.update(num_update=optimizer.num_update, rate=optimizer.learning_rate, scheduler=scheduler and repr(vars(scheduler)),
                 variables=repr({name: vars(optimizer)[name] for name in ('m_schedule', 'last_lr') if name in vars(optimizer)}))
    arguments, auxiliary = module.get_params()
    found['on the host'] = {name: digest(array) for name, array in sorted({**arguments, **auxiliary}.items())}
    if draw:
        noise = (mx.nd.random.uniform(ctx=context).asscalar() for context in module._context)
        found['noise'] = [float(np.random.rand()), *map(float, noise)]
    return json.loads(json.dumps(found))


def flat(state):
    if state is None:
        return []
    return [array for item in state for array in flat(item)] if isinstance(state, (tuple, list)) else [state]


def digest(array):
    return f'{array.dtype.__name__} {array.shape} {hashlib.sha256(array.asnumpy().tobytes()).hexdigest()[:16]}'


def child(function):
    """What ``function`` returns in a process of its own; None if that was killed."""
    pid, read = in_child(lambda say: say(function()))
    said = lines(read)
    os.waitpid(pid, 0)
    if said and isinstance(said[-1], str):
        raise RuntimeError(said[-1])
    return said[-1] if said else None


def resumed(case, prefix):
    module = make(**dict(case, seed=5))  # another start, all of which the checkpoint replaces
    begin = go.load_module_checkpoint(module, prefix)
    return [begin, facts(fit(module, prefix, begin=begin))]


def main(folder, cases):
    found = []
    for number, case in enumerate(json.loads(cases)):
        prefix = os.path.join(folder, f'{number}', 'killed')
        straight = child(lambda case=case, number=number: facts(fit(make(**case), os.path.join(folder, f'{number}', 'straight'))))
        killed = child(lambda case=case, prefix=prefix: facts(fit(make(**case), prefix, killed_in=2)))
        begin, after = child(lambda case=case, prefix=prefix: resumed(case, prefix))
        found.append({'killed': killed is None, 'begin': begin, 'resumed': after, 'straight': straight})
    print(json.dumps(found))


if __name__ == '__main__':
    main(*sys.argv[1:])
