"""Write small files with a real MXNet, and what that MXNet itself reads from them: tests/test_legacy.py reads them without.

Runs on every version of MXNet, on Python 2.7 too:

    python make_fixtures.py FOLDER     # FOLDER is called after the version

Each folder holds the files, ``expected.npz`` (arrays, by 'file/name' or 'file/index/place in the state') and
``provenance.json``.
"""
import json
import os
import platform
import sys

import mxnet as mx
import numpy as np

NUMPY = mx.__version__.startswith('2')  # 2.0 is in NumPy mode by itself
MODERN = NUMPY or mx.__version__.startswith('1.')
OPTIMIZERS = {
    'sgd': dict(momentum=0.9), 'nag': dict(momentum=0.9), 'adagrad': {}, 'rmsprop': {}, 'adadelta': {}, 'adam': {}, 'adamax': {},
    'nadam': {}, 'signum': {}, 'dcasgd': dict(momentum=0.0), 'ftrl': {}, 'ftml': {}, 'sgld': {}, 'lamb': {},
    'lars': dict(momentum=0.9),
}
if NUMPY:
    OPTIMIZERS.update(adamw={}, adabelief={}, lans={})
else:
    OPTIMIZERS.update(lbsgd=dict(momentum=0.9, updates_per_epoch=4, begin_epoch=2, batch_scale=2))
SHAPES = [(2, 3), (4,)]


def nd(array, dtype='float32'):
    return (mx.np if NUMPY else mx.nd).array(array, dtype=dtype)


def flat(state, place=''):
    """The arrays in a state, by their places in its tuples."""
    if state is None:
        return {}
    if isinstance(state, (tuple, list)):
        return {k: v for i, x in enumerate(state) for k, v in flat(x, place + str(i)).items()}
    return {place: state.asnumpy()}


def parameters(folder, expected):
    def save(name, data):
        mx.nd.save(os.path.join(folder, name), data)
        loaded = mx.nd.load(os.path.join(folder, name))
        items = loaded.items() if isinstance(loaded, dict) else enumerate(loaded)
        for key, array in items:
            value = array.asnumpy()
            if value.dtype.names:  # MXNet's bfloat16: its bits
                value = value.view('uint16')
            expected['%s/%s' % (name, key)] = value

    values = np.array([[0, 1, 2], [3, 250, 7]])
    old = ['float32', 'float64', 'float16', 'uint8', 'int32']
    save('dict.params', {t: mx.nd.array(values % 128, dtype=t) for t in old})
    save('list.params', [mx.nd.array(values % 128, dtype=t) for t in old])
    save('module.params', {'arg:fc_weight': mx.nd.array(values), 'aux:bn_moving_mean': mx.nd.array(values[0])})
    if not MODERN:
        return
    more = ['int8', 'int64', 'bool'] if not mx.__version__.startswith('1.5') else ['int8', 'int64']
    if NUMPY:
        more += ['int16', 'uint16', 'uint32', 'uint64']
    save('more.params', {t: mx.nd.array(values % 128, dtype=t) for t in more})
    if NUMPY:
        arrays = {'0.weight': nd(values, 'float16'), 'scalar': mx.np.ones(()), 'empty': mx.np.zeros((0, 3)),
                  'bits': mx.np.array(values[0] > 0), 'whole': mx.np.array(values, dtype='int64')}
        mx.npx.savez(os.path.join(folder, 'npx.params'), **arrays)
        for key, array in mx.npx.load(os.path.join(folder, 'npx.params')).items():
            expected['npx.params/' + key] = array.asnumpy()
        sparse = {'row_sparse': mx.nd.array([[0, 0], [1, 2], [0, 0]]).tostype('row_sparse'),
                  'csr': mx.nd.array([[0, 3], [1, 2], [0, 0]]).tostype('csr')}
        mx.npx.savez(os.path.join(folder, 'npx-sparse.params'), **sparse)
        for key, array in sparse.items():  # 2.0.0b1 cannot read these again
            expected['npx-sparse.params/' + key] = array.tostype('default').asnumpy()
        from mxnet.amp.amp import bfloat16
        mx.npx.savez(os.path.join(folder, 'npx-bfloat16.params'), x=mx.nd.amp_cast(mx.nd.array([1.5, -2, 3e30]), dtype=bfloat16))
        expected['npx-bfloat16.params/x'] = mx.nd.amp_cast(mx.nd.array([1.5, -2, 3e30]), dtype=bfloat16).asnumpy().view('uint16')
    else:
        save('sparse.params', {'row_sparse': mx.nd.array([[0, 0], [1, 2], [0, 0]]).tostype('row_sparse'),
                               'csr': mx.nd.array([[0, 3], [1, 2], [0, 0]]).tostype('csr'),
                               'no_rows': mx.nd.sparse.zeros('row_sparse', (4, 3)), 'no_values': mx.nd.sparse.zeros('csr', (4, 3)),
                               'half': mx.nd.array([[0, 0], [1, 2]], dtype='float16').tostype('row_sparse')})
    if not mx.__version__.startswith('1.5'):
        if not NUMPY:
            from mxnet.contrib.amp.amp import bfloat16
        save('bfloat16.params', {'x': mx.nd.amp_cast(mx.nd.array([1.5, -2, 3e30]), dtype=bfloat16)})
        with mx.util.np_shape(True):
            save('npshape.params', {'scalar': mx.nd.ones(()), 'empty': mx.nd.zeros((0, 3)), 'plain': mx.nd.ones((2, 3))})


def states(folder, expected, file, name, arguments, dtype='float32', steps=3, dump=True):
    """Some updates of two parameters, then the updater's states."""
    optimizer = mx.optimizer.create(name, param_idx2name={0: 'a_weight', 1: 'b_bias'}, **arguments)
    updater = mx.optimizer.get_updater(optimizer)
    random = np.random.RandomState(len(file))
    weights = [nd(random.randn(*shape), dtype) for shape in SHAPES]
    for _ in range(steps):
        for i, weight in enumerate(weights):
            updater(i, nd(random.randn(*weight.shape), dtype), weight)
    try:
        data = updater.get_states(dump_optimizer=dump)
    except TypeError:
        data = updater.get_states()
    with open(os.path.join(folder, file), 'wb') as out:
        out.write(data)
    updater.set_states(data)
    for index, state in updater.states.items():
        expected.update({'%s/%s/%s' % (file, index, k): v for k, v in flat(state).items()})


def network(folder, expected):
    """A network of 11 equal layers: its parameters, and its trainer's states, which are expected under the parameters' names."""
    net = mx.gluon.nn.HybridSequential() if NUMPY else mx.gluon.nn.HybridSequential(prefix='net_')
    for _ in range(11):
        if NUMPY:
            net.add(mx.gluon.nn.Dense(2, in_units=2))
        else:
            with net.name_scope():
                net.add(mx.gluon.nn.Dense(2, in_units=2))
    if NUMPY:  # in 1.9 its names, batchnorm..., would come first in the trainer, and no order of the file would fit
        net.add(mx.gluon.nn.BatchNorm(in_channels=2))
    net.initialize(mx.init.Normal(1))
    trainer = mx.gluon.Trainer(net.collect_params(), 'sgd', dict(learning_rate=0.1, momentum=0.9))
    x = (mx.np if NUMPY else mx.nd).array([[1.0, -2.0], [0.5, 3.0]])
    with mx.autograd.record():
        loss = (net(x) ** 2).sum()
    loss.backward()
    trainer.step(1)
    net.save_parameters(os.path.join(folder, 'net.params'))
    trainer.save_states(os.path.join(folder, 'net.states'))
    places = {id(p): name for name, p in net._collect_params_with_prefix().items()}
    expected.update({'net.params/' + name: p.data().asnumpy() for name, p in net._collect_params_with_prefix().items()})
    for index, parameter in enumerate(trainer._params):
        state = (trainer._kvstore._updater if trainer._update_on_kvstore else trainer._updaters[0]).states.get(index)
        if state is not None:
            expected['net.states/' + places[id(parameter)]] = state.asnumpy()


def main(folder):
    if not os.path.isdir(folder):
        os.makedirs(folder)
    expected = {}
    parameters(folder, expected)
    if not MODERN:
        states(folder, expected, 'adam.states', 'adam', {})
    elif mx.__version__.startswith('1.5'):
        for name in ('adam', 'sgd'):
            arguments = dict(OPTIMIZERS[name], learning_rate=np.float64(0.1), lr_scheduler=mx.lr_scheduler.FactorScheduler(2, 0.5))
            states(folder, expected, name + '.states', name, arguments)
            states(folder, expected, name + '-master.states', name, dict(arguments, multi_precision=True), 'float16')
    else:
        network(folder, expected)
        schedule = mx.lr_scheduler.MultiFactorScheduler([2, 5], 0.5, warmup_steps=1)
        for name, arguments in sorted(OPTIMIZERS.items()):
            states(folder, expected, name + '.states', name, arguments)
            if not (NUMPY and name in ('adabelief', 'adamw', 'lans')):
                states(folder, expected, name + '-master.states', name, dict(arguments, multi_precision=True), 'float16')
        states(folder, expected, 'adam-scheduled.states', 'adam',
               dict(lr_scheduler=schedule, learning_rate=np.float32(0.25), begin_num_update=7, wd=1e-4, clip_gradient=2.0), steps=4)
        states(folder, expected, 'adam-bare.states', 'adam', {}, dump=False)
        states(folder, expected, 'rmsprop-centered.states', 'rmsprop', dict(centered=True), steps=1)
        if NUMPY:
            states(folder, expected, 'rmsprop-unfused.states', 'rmsprop', dict(centered=True, use_fused_step=False), steps=1)
    np.savez_compressed(os.path.join(folder, 'expected.npz'), **expected)
    with open(os.path.join(folder, 'provenance.json'), 'w') as out:
        json.dump({'mxnet': mx.__version__, 'python': platform.python_version(), 'numpy': np.__version__, 'license': 'Apache-2.0',
                   'command': 'python make_fixtures.py ' + os.path.basename(folder)}, out, indent=1, sort_keys=True)
        out.write('\n')


if __name__ == '__main__':
    main(sys.argv[1])
