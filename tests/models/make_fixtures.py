"""Write small nets with a real MXNet, and what they answer to an input: tests/test_models.py converts them without MXNet.

    python make_fixtures.py FOLDER     # FOLDER is called after the version: 1.9.1 or 2.0.0b1

Each folder holds ``<net>.params`` of save_parameters, ``<net>-0000.params`` and ``<net>-symbol.json`` of export, for 1.9.1 a
checkpoint of the symbolic interface too, ``expected.npz`` (inputs and outputs) and ``provenance.json``.
"""
import json
import os
import platform
import sys

import mxnet as mx
import numpy as np
from mxnet import gluon

NUMPY = mx.__version__.startswith('2')
nn = gluon.nn


def image():
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3, in_channels=2), nn.BatchNorm(in_channels=4, scale=False, epsilon=1e-3), nn.PReLU(),
            nn.GroupNorm(2, in_channels=4) if NUMPY else nn.GroupNorm(2),
            nn.Conv2DTranspose(3, 2, strides=2, in_channels=4), nn.Dense(5, in_units=192))
    return net, np.random.RandomState(1).randn(2, 2, 6, 6)


def text():
    net = nn.HybridSequential()
    net.add(nn.Embedding(7, 5), gluon.rnn.LSTM(3, 2, bidirectional=True, input_size=5), nn.LayerNorm(in_channels=6),
            nn.Dense(4, flatten=False, in_units=6))
    return net, np.random.RandomState(1).randint(0, 7, (4, 2))


def randomize(parameters):
    random = np.random.RandomState(0)
    for name, parameter in parameters:
        value = 0.5 * random.randn(*parameter.shape)
        value = abs(value) + 0.5 if name.endswith('var') else value
        parameter.set_data((mx.np if NUMPY else mx.nd).array(value, dtype='float32'))


def module(folder, expected):
    """Symbols and a checkpoint: fix_gamma by default, and all parameters of a GRU in one vector."""
    x = np.random.RandomState(1).randn(2, 4, 5)
    data = mx.sym.BatchNorm(mx.sym.Variable('data'), axis=2, name='norm')
    cell = mx.rnn.FusedRNNCell(3, 2, 'gru', bidirectional=True, prefix='gru_')
    hidden, _ = cell.unroll(4, data, layout='NTC', merge_outputs=True)
    symbol = mx.sym.FullyConnected(hidden, num_hidden=2, flatten=False, name='head')
    bound = symbol.simple_bind(mx.cpu(), data=x.shape, grad_req='null')
    random = np.random.RandomState(0)
    arguments = {name: mx.nd.array(0.5 * random.randn(*array.shape)) for name, array in bound.arg_dict.items() if name != 'data'}
    states = {name: mx.nd.array(0.5 + random.rand(*array.shape)) for name, array in bound.aux_dict.items()}
    bound.copy_params_from(arguments, states)
    expected['module/x'], expected['module/y'] = x, bound.forward(data=mx.nd.array(x))[0].asnumpy()
    mx.model.save_checkpoint(os.path.join(folder, 'module'), 0, symbol, arguments, states)


def main(folder):
    os.makedirs(folder, exist_ok=True)
    expected = {}
    for build in (image, text):
        name = build.__name__
        path = os.path.join(folder, name)
        net, x = build()
        net.initialize()
        net.hybridize()
        inputs = (mx.np if NUMPY else mx.nd).array(x, dtype='float32')
        net(inputs)
        randomize((net.collect_params() if NUMPY else net._collect_params_with_prefix()).items())
        expected[name + '/x'], expected[name + '/y'] = x, net(inputs).asnumpy()
        net.save_parameters(path + '.params')
        net.export(path)
    if not NUMPY:
        module(folder, expected)
    np.savez(os.path.join(folder, 'expected.npz'), **expected)
    with open(os.path.join(folder, 'provenance.json'), 'w') as file:
        json.dump({'mxnet': mx.__version__, 'python': platform.python_version(), 'numpy': np.__version__,
                   'command': 'python tests/models/make_fixtures.py tests/models/' + os.path.basename(folder)}, file, indent=1)


if __name__ == '__main__':
    main(sys.argv[1])
