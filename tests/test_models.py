"""Weights of Gluon nets in PyTorch: real layers of both, on the same input; names, maps, layouts, and states that follow."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gluon_optim as go
from gluon_optim import cli
from gluon_optim.models import model_to_torch, suggest_names
from gluon_optim.models.gluon import Source
from gluon_optim.models.plan import Rnn
from gluon_optim.states.model import OptimizerStates, ParameterInfo

FIXTURES = Path(__file__).parent / 'models'
VERSIONS = ('1.9.1', '2.0.0b1')
RANDOM = np.random.default_rng(0)


def normal(*shape):
    return RANDOM.normal(size=shape).astype('float32')


def close(ours, theirs):
    """Both frameworks sum in orders of their own: a few ulp of the largest."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


# Real layers of both

@pytest.fixture()
def mx():
    mx = pytest.importorskip('mxnet')
    mx.random.seed(0)
    return mx


@pytest.fixture()
def torch():
    return pytest.importorskip('torch')


def randomized(mx, net, x):
    """``net`` with parameters and running statistics that are no defaults, and its answer to ``x``."""
    net.initialize()
    net(mx.nd.array(x))
    for name, parameter in net._collect_params_with_prefix().items():
        value = 0.5 * normal(*parameter.shape)
        parameter.set_data(mx.nd.array(abs(value) + 0.5 if name.endswith('var') else value))
    answer = net(mx.nd.array(x))
    return (answer[0] if isinstance(answer, (tuple, list)) else answer).asnumpy()


IMAGE, SEQUENCE, VOLUME = (2, 4, 7, 6), (2, 4, 9), (2, 4, 5, 4, 6)
LAYERS = {
    'dense': (lambda nn: nn.Dense(3, in_units=4), lambda nn: nn.Linear(4, 3), (5, 4)),
    'dense without bias': (lambda nn: nn.Dense(3, use_bias=False), lambda nn: nn.Linear(4, 3, bias=False), (5, 4)),
    'conv1d': (lambda nn: nn.Conv1D(6, 3, 2, 1), lambda nn: nn.Conv1d(4, 6, 3, 2, 1), SEQUENCE),
    'conv2d': (lambda nn: nn.Conv2D(6, (3, 2), 2, (1, 0)), lambda nn: nn.Conv2d(4, 6, (3, 2), 2, (1, 0)), IMAGE),
    'conv2d in groups, dilated': (lambda nn: nn.Conv2D(6, 3, dilation=2, groups=2),
                                  lambda nn: nn.Conv2d(4, 6, 3, dilation=2, groups=2), IMAGE),
    'conv3d': (lambda nn: nn.Conv3D(6, (2, 3, 2)), lambda nn: nn.Conv3d(4, 6, (2, 3, 2)), VOLUME),
    'conv1d transposed': (lambda nn: nn.Conv1DTranspose(6, 3, 2, 1, 1), lambda nn: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1), SEQUENCE),
    'conv2d transposed': (lambda nn: nn.Conv2DTranspose(6, (3, 2), 2), lambda nn: nn.ConvTranspose2d(4, 6, (3, 2), 2), IMAGE),
    'conv2d transposed in groups': (lambda nn: nn.Conv2DTranspose(6, 3, groups=2, in_channels=4),
                                    lambda nn: nn.ConvTranspose2d(4, 6, 3, groups=2), IMAGE),
    'conv3d transposed': (lambda nn: nn.Conv3DTranspose(6, (2, 3, 2)), lambda nn: nn.ConvTranspose3d(4, 6, (2, 3, 2)), VOLUME),
    'batch norm 1d': (lambda nn: nn.BatchNorm(), lambda nn: nn.BatchNorm1d(4), (5, 4)),
    'batch norm 2d': (lambda nn: nn.BatchNorm(epsilon=1e-3), lambda nn: nn.BatchNorm2d(4, eps=1e-3), IMAGE),
    'batch norm, fixed gamma': (lambda nn: nn.BatchNorm(scale=False), lambda nn: nn.BatchNorm2d(4), IMAGE),
    'batch norm 3d': (lambda nn: nn.BatchNorm(), lambda nn: nn.BatchNorm3d(4), VOLUME),
    'layer norm': (lambda nn: nn.LayerNorm(), lambda nn: nn.LayerNorm(9), SEQUENCE),
    'group norm': (lambda nn: nn.GroupNorm(2), lambda nn: nn.GroupNorm(2, 4), IMAGE),
    'group norm, one group': (lambda nn: nn.GroupNorm(1), lambda nn: nn.GroupNorm(1, 4), IMAGE),
    'instance norm': (lambda nn: nn.InstanceNorm(), lambda nn: nn.InstanceNorm2d(4, affine=True), IMAGE),
    'prelu': (lambda nn: nn.PReLU(), lambda nn: nn.PReLU(), IMAGE),
    'prelu per channel': (lambda nn: nn.PReLU(in_channels=4), lambda nn: nn.PReLU(4), IMAGE),
}
RECURRENT = {
    'rnn tanh': (lambda rnn: rnn.RNN(3, activation='tanh', input_size=5), lambda nn: nn.RNN(5, 3)),
    'rnn relu': (lambda rnn: rnn.RNN(3, 2, 'relu', input_size=5), lambda nn: nn.RNN(5, 3, 2, nonlinearity='relu')),
    'lstm': (lambda rnn: rnn.LSTM(3, input_size=5), lambda nn: nn.LSTM(5, 3)),
    'lstm, deep, both ways': (lambda rnn: rnn.LSTM(3, 2, bidirectional=True, input_size=5),
                              lambda nn: nn.LSTM(5, 3, 2, bidirectional=True)),
    'lstm, projected': (lambda rnn: rnn.LSTM(4, 2, bidirectional=True, projection_size=3, input_size=5),
                        lambda nn: nn.LSTM(5, 4, 2, bidirectional=True, proj_size=3)),
    'gru': (lambda rnn: rnn.GRU(3, input_size=5), lambda nn: nn.GRU(5, 3)),
    'gru, deep, both ways': (lambda rnn: rnn.GRU(3, 3, bidirectional=True, input_size=5),
                             lambda nn: nn.GRU(5, 3, 3, bidirectional=True)),
}


def answers(torch, module, model, x):
    module.load_state_dict(model.state_dict())
    module.eval()
    with torch.no_grad():
        answer = module(torch.from_numpy(x))
    return (answer[0] if isinstance(answer, tuple) else answer).numpy()


@pytest.mark.parametrize('name', LAYERS)
def test_a_layer_answers_as_it_did(mx, torch, tmp_path, name):
    build, rebuild, shape = LAYERS[name]
    x = normal(*shape)
    net = mx.gluon.nn.HybridSequential()
    net.add(build(mx.gluon.nn))
    expected = randomized(mx, net, x)
    module = torch.nn.Sequential(rebuild(torch.nn))
    close(answers(torch, module, model_to_torch(net, like=module), x), expected)
    if name not in ('group norm', 'group norm, one group', 'batch norm, fixed gamma'):  # where a file does not tell all
        net.save_parameters(str(tmp_path / 'net.params'))
        close(answers(torch, module, model_to_torch(tmp_path / 'net.params'), x), expected)
    net.hybridize()
    net(mx.nd.array(x))
    net.export(str(tmp_path / 'exported'))
    close(answers(torch, module, model_to_torch(tmp_path / 'exported-0000.params', like=module), x), expected)


@pytest.mark.filterwarnings('ignore:LSTM with projections')
@pytest.mark.parametrize('name', RECURRENT)
def test_a_recurrent_layer_answers_as_it_did(mx, torch, tmp_path, name):
    build, rebuild = RECURRENT[name]
    net, module, x = build(mx.gluon.rnn), rebuild(torch.nn), normal(6, 2, 5)
    expected = randomized(mx, net, x)
    close(answers(torch, module, model_to_torch(net), x), expected)
    net.save_parameters(str(tmp_path / 'net.params'))
    close(answers(torch, module, model_to_torch(tmp_path / 'net.params', like=module), x), expected)


@pytest.mark.parametrize('mode', ['rnn_tanh', 'rnn_relu', 'lstm', 'gru'])
@pytest.mark.parametrize('bidirectional', [False, True])
def test_a_packed_vector_is_unpacked(mx, torch, mode, bidirectional):
    module = {'lstm': torch.nn.LSTM, 'gru': torch.nn.GRU}.get(mode, torch.nn.RNN)(
        5, 3, 2, bidirectional=bidirectional, **({'nonlinearity': mode[4:]} if mode.startswith('rnn') else {}))
    net = torch.nn.ModuleDict({'cell': module})
    x, vector = normal(6, 2, 5), 0.5 * normal(sum(array.numel() for array in module.parameters()))
    ways = 2 if bidirectional else 1
    start = [mx.nd.zeros((2 * ways, 2, 3))] * (2 if mode == 'lstm' else 1)
    expected = mx.nd.RNN(mx.nd.array(x), mx.nd.array(vector), *start, state_size=3, num_layers=2, mode=mode,
                         bidirectional=bidirectional).asnumpy()
    entry = {'from': 'cell_parameters', 'rnn': mode, 'hidden': 3, 'layers': 2, 'bidirectional': bidirectional}
    source = {'cell_parameters': vector}
    mapped = model_to_torch(source, names={'cell.*': entry})
    like = model_to_torch(source, like=net)
    assert set(mapped.weights) == set(like.weights) == set(net.state_dict())
    for model in (mapped, like):
        net.load_state_dict(model.state_dict())
        close(module(torch.from_numpy(x))[0].detach(), expected)


@pytest.mark.parametrize('name', ['RNNCell', 'LSTMCell', 'GRUCell'])
def test_a_cell_answers_as_it_did(mx, torch, name):
    x, state = normal(2, 5), normal(2, 3)
    net, module = getattr(mx.gluon.rnn, name)(3, input_size=5), getattr(torch.nn, name)(5, 3)
    net.initialize()
    for parameter in net.collect_params().values():
        parameter.set_data(mx.nd.array(normal(*parameter.shape)))
    twice = name == 'LSTMCell'
    expected = net(mx.nd.array(x), [mx.nd.array(state)] * (2 if twice else 1))[0].asnumpy()
    module.load_state_dict(model_to_torch(net, like=module).state_dict())
    state = torch.from_numpy(state)
    answer = module(torch.from_numpy(x), (state, state) if twice else state)
    close((answer[0] if twice else answer).detach(), expected)


def test_an_embedding_answers_as_it_did(mx, torch):
    net, words = mx.gluon.nn.Embedding(7, 3), np.array([[0, 6, 2]])
    expected = randomized(mx, net, words.astype('float32'))
    module = torch.nn.Embedding(7, 3)
    module.load_state_dict(model_to_torch(net).state_dict())
    np.testing.assert_array_equal(module(torch.from_numpy(words)).detach(), expected)


def channels_last_convolution(x, weight, bias):
    """As MXNet documents NHWC: its CPU operator refuses it, so no real one can be asked. x: (N, H, W, C), weight: (O, h, w, C)."""
    height, width = (x.shape[1 + k] - weight.shape[1 + k] + 1 for k in (0, 1))
    patches = np.stack([x[:, i:i + height, j:j + width] for i in range(weight.shape[1]) for j in range(weight.shape[2])], 3)
    return np.einsum('nhwkc,okc->nhwo', patches, weight.reshape(len(weight), -1, weight.shape[3])) + bias


def channels_last_net(mx):
    nn = mx.gluon.nn
    net = nn.HybridSequential()
    net.add(nn.Conv2D(6, (3, 2), layout='NHWC', in_channels=4), nn.BatchNorm(axis=3, in_channels=6), nn.Flatten(),
            nn.Dense(2, in_units=6 * 5 * 5))
    net.initialize()
    for name, parameter in net._collect_params_with_prefix().items():
        value = normal(*parameter.shape)
        parameter.set_data(mx.nd.array(abs(value) + 0.5 if name.endswith('var') else value))
    return net


def test_channels_last(mx, torch, tmp_path):
    net, x = channels_last_net(mx), normal(2, 7, 6, 4)
    arrays = {name: parameter.data().asnumpy() for name, parameter in net._collect_params_with_prefix().items()}
    hidden = mx.nd.array(channels_last_convolution(x, arrays['0.weight'], arrays['0.bias']))
    expected = net[3](net[1](hidden)).asnumpy()

    nn = torch.nn
    module = nn.Sequential(nn.Conv2d(4, 6, (3, 2)), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(150, 2))
    names = suggest_names(net, like=module)
    assert names['0.weight'] == {'from': '0.weight', 'transpose': [0, 3, 1, 2]}
    names['3.weight'] = {'from': '3.weight', 'view': [2, 5, 5, 6], 'transpose': [0, 3, 1, 2], 'shape': [2, 150]}
    model = model_to_torch(net, like=module, names=names)
    close(answers(torch, module, model, np.ascontiguousarray(x.transpose(0, 3, 1, 2))), expected)

    net.save_parameters(str(tmp_path / 'net.params'))  # which does not tell the layout: the shapes of `like` do
    model = model_to_torch(tmp_path / 'net.params', like=module)
    np.testing.assert_array_equal(model.weights['0.weight'], arrays['0.weight'].transpose(0, 3, 1, 2))
    assert any('channels last' in line for line in model.report)


def test_a_symbol_tells_the_layout(mx, tmp_path):
    weight = normal(8, 3, 3, 3)
    symbol = mx.sym.Convolution(mx.sym.Variable('data'), kernel=(3, 3), num_filter=8, no_bias=True, layout='NHWC', name='conv')
    symbol.save(str(tmp_path / 'net-symbol.json'))
    mx.nd.save(str(tmp_path / 'net-0007.params'), {'arg:conv_weight': mx.nd.array(weight)})
    model = model_to_torch(tmp_path / 'net-0007.params')
    np.testing.assert_array_equal(model.weights['conv.weight'], weight.transpose(0, 3, 1, 2))


def test_a_layout_that_shapes_do_not_tell_is_asked_for():
    arrays = {'0.weight': normal(8, 3, 3, 3), '1.weight': normal(4, 3, 3, 8)}
    like = {'0.weight': normal(8, 3, 3, 3), '1.weight': normal(4, 8, 3, 3)}
    with pytest.raises(ValueError, match="'0.weight' of the state_dict could be channels first or last"):
        model_to_torch(arrays, like=like)
    last = {'from': '0.weight', 'transpose': [0, 3, 1, 2]}
    for first in (last, {'from': '0.weight', 'view': [8, 3, 3, 3]}):
        names = {'0.weight': first, '1.weight': {'from': '1.weight', 'transpose': [0, 3, 1, 2]}}
        moved = model_to_torch(arrays, like=like, names=names).weights['0.weight']
        assert np.array_equal(moved, arrays['0.weight'].transpose(0, 3, 1, 2) if first is last else arrays['0.weight'])


# What MXNet wrote, without MXNet

def image_module(nn):
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, eps=1e-3), nn.PReLU(), nn.GroupNorm(2, 4),
                         nn.ConvTranspose2d(4, 3, 2, 2), nn.Flatten(), nn.Linear(192, 5))


def text_module(nn):
    class First(nn.Module):
        def forward(self, outputs):
            return outputs[0]
    return nn.Sequential(nn.Embedding(7, 5), nn.LSTM(5, 3, 2, bidirectional=True), First(), nn.LayerNorm(6), nn.Linear(6, 4))


@pytest.mark.parametrize('version', VERSIONS)
@pytest.mark.parametrize('file', ['image-0000.params', 'text.params', 'text-0000.params'])
def test_files_of_mxnet(torch, version, file):
    """Their names are not those of the module, which has a layer more: order and shapes tell."""
    name = file[:5].rstrip('-.')
    module = (image_module if name == 'image' else text_module)(torch.nn)
    expected = np.load(FIXTURES / version / 'expected.npz')
    x = expected[f'{name}/x']
    model = model_to_torch(FIXTURES / version / file, like=module)
    close(answers(torch, module, model, x.astype('float32') if name == 'image' else x), expected[f'{name}/y'])


def test_a_symbol_tells_what_its_parameters_do_not(torch):
    expected = np.load(FIXTURES / '1.9.1/expected.npz')
    model = model_to_torch(FIXTURES / '1.9.1/module-0000.params')
    nn = torch.nn
    net = nn.ModuleDict({'norm': nn.BatchNorm1d(5, eps=1e-3), 'gru': nn.GRU(5, 3, 2, bidirectional=True, batch_first=True),
                         'head': nn.Linear(6, 2)})
    net.load_state_dict(model.state_dict())
    net.eval()
    x = torch.from_numpy(expected['module/x']).float()
    with torch.no_grad():
        close(net['head'](net['gru'](net['norm'](x.transpose(1, 2)).transpose(1, 2))[0]), expected['module/y'])
    assert "give the layer of 'norm' eps=0.001" in model.report
    assert any('fix_gamma' in line for line in model.report)


def test_without_its_symbol_the_vector_is_asked_about(tmp_path):
    path = tmp_path / 'module-0000.params'
    path.write_bytes((FIXTURES / '1.9.1/module-0000.params').read_bytes())
    with pytest.raises(ValueError, match=r'"gru\.\*": \{"from": "gru_parameters", "rnn": "lstm"'):
        model_to_torch(path)
    draft = suggest_names(path)
    assert draft['gru.*']['hidden'] == 0  # to be filled in
    with pytest.raises(ValueError, match='must be 1 or more'):
        model_to_torch(path, names=draft)
    draft['gru.*'] = {'from': 'gru_parameters', 'rnn': 'gru', 'hidden': 3, 'layers': 2, 'bidirectional': True}
    whole = model_to_torch(FIXTURES / '1.9.1/module-0000.params')
    model = model_to_torch(path, names=draft)
    assert all(np.array_equal(model.weights[name], array) for name, array in whole.weights.items() if name != 'norm.weight')
    assert any('symbol, which is not at' in line for line in model.report)
    graph = json.loads((FIXTURES / '1.9.1/module-symbol.json').read_text())
    del next(node for node in graph['nodes'] if node['op'] == 'RNN')['attrs']['mode']
    for broken in (graph, {'nodes': 3}):
        path.with_name('module-symbol.json').write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=r'module-symbol\.json.*Repair it'):
            model_to_torch(path)


def test_neither_mxnet_nor_torch_is_needed(tmp_path):
    code = ('import sys\n'
            'class Absent:\n'
            '    def find_spec(self, name, path=None, target=None):\n'
            '        if name in ("mxnet", "torch", "safetensors"): raise ImportError(name)\n'
            'sys.meta_path.insert(0, Absent())\n'
            'import importlib.util; importlib.util.find_spec = lambda name: None\n'
            'from gluon_optim import cli\n'
            'sys.exit(cli.main(["convert", *sys.argv[1:]]))')
    arguments = [str(FIXTURES / '2.0.0b1/image.params'), '--to', 'safetensors', '-o', str(tmp_path / 'x.safetensors')]
    done = subprocess.run([sys.executable, '-c', code, *arguments], stderr=subprocess.PIPE,
                          env={**os.environ, 'PYTHONPATH': str(FIXTURES.parent.parent)})
    assert done.returncode == 0, done.stderr.decode()
    loaded = pytest.importorskip('safetensors.numpy').load_file(tmp_path / 'x.safetensors')
    weights = model_to_torch(FIXTURES / '2.0.0b1/image.params').weights
    assert set(loaded) == set(weights)
    assert all(np.array_equal(loaded[name], array) for name, array in weights.items())


# Names

NET = {'features.0.weight': normal(4, 2, 3, 3), 'features.1.gamma': normal(4), 'features.1.beta': normal(4),
       'features.1.running_mean': normal(4), 'features.1.running_var': 1 + abs(normal(4)),
       'features.2.weight': normal(5, 4, 3, 3), 'output.weight': normal(3, 5), 'output.bias': normal(3)}
LIKE = {'conv1.weight': np.zeros((4, 2, 3, 3)), 'bn1.weight': np.zeros(4), 'bn1.bias': np.zeros(4), 'bn1.running_mean': np.zeros(4),
        'bn1.running_var': np.zeros(4), 'bn1.num_batches_tracked': np.zeros((), 'int64'), 'conv2.weight': np.zeros((5, 4, 3, 3)),
        'fc.weight': np.zeros((3, 5)), 'fc.bias': np.zeros(3)}

MAP = {'conv1.weight': 'features.0.weight', 'bn1.weight': 'features.1.gamma', 'bn1.bias': 'features.1.beta',
       'bn1.running_mean': 'features.1.running_mean', 'bn1.running_var': 'features.1.running_var',
       'conv2.weight': 'features.2.weight', 'fc.weight': 'output.weight', 'fc.bias': 'output.bias'}


def but(arrays, **changes):
    """``arrays`` with other entries; None takes one out. A dot is written as two underscores."""
    changes = {name.replace('__', '.'): value for name, value in changes.items()}
    return {name: array for name, array in {**arrays, **changes}.items() if array is not None}


def test_names_by_convention():
    assert list(model_to_torch(NET).weights) == [
        'features.0.weight', 'features.1.weight', 'features.1.bias', 'features.1.running_mean', 'features.1.running_var',
        'features.1.num_batches_tracked', 'features.2.weight', 'output.weight', 'output.bias']
    full = {'net0_conv0_weight': normal(2), 'net0_batchnorm0_moving_var': normal(2), 'net0_lstm0_r0_h2h_weight': normal(2),
            'scale': normal(1)}
    assert list(model_to_torch(full).weights) == ['net0_conv0.weight', 'net0_batchnorm0.running_var',
                                                  'net0_batchnorm0.num_batches_tracked', 'net0_lstm0.weight_hh_l0_reverse', 'scale']
    with pytest.raises(ValueError, match=r"'0.weight' would be both '0.weight' and '0.gamma'"):
        model_to_torch({'0.weight': normal(2), '0.gamma': normal(2)})


def test_layers_are_matched_in_order():
    model = model_to_torch(NET, like=LIKE)
    assert list(model.weights) == list(LIKE)
    for theirs, ours in MAP.items():
        assert np.array_equal(model.weights[theirs], NET[ours])
    assert [row['name'] for row in model.rows] == list(LIKE)
    assert model.rows[1] == {'name': 'bn1.weight', 'from': 'features.1.gamma', 'shape': [4], 'dtype': 'float32', 'how': 'unchanged'}


def test_layers_in_another_order_are_matched_by_their_shapes():
    shuffled = {name: LIKE[name] for name in sorted(LIKE, reverse=True)}
    model = model_to_torch(NET, like=shuffled)
    assert list(model.weights) == list(shuffled)
    assert np.array_equal(model.weights['conv2.weight'], NET['features.2.weight'])


def test_what_is_ambiguous_is_asked_about():
    net = but(NET, features__2__weight=normal(4, 2, 3, 3))
    like = {name: LIKE[name] for name in sorted(LIKE, reverse=True)}
    like['conv2.weight'] = np.zeros((4, 2, 3, 3))
    with pytest.raises(ValueError, match=r"at place 1: Gluon's 'features.0.weight' \(4, 2, 3, 3\), PyTorch's 'fc.weight'.*suggest"):
        model_to_torch(net, like=like)
    draft = suggest_names(net, like=like)
    assert draft['conv1.weight'] == {'choose': ['features.0.weight', 'features.2.weight']}
    with pytest.raises(ValueError, match='Put one of these names in its place'):
        model_to_torch(net, like=like, names=draft)
    in_order = model_to_torch(net, like=but(LIKE, conv2__weight=np.zeros((4, 2, 3, 3))))  # their order decides, and that is said
    assert in_order.report[0].startswith('2 layers have other names')
    assert not any('other names' in line for line in model_to_torch(NET, like=LIKE).report)
    assert np.array_equal(in_order.weights['conv2.weight'], net['features.2.weight'])


@pytest.mark.parametrize('net, like, message', [
    (but(NET, output__bias=None), LIKE, r"3 of 4 layers fit; .* at place 4: Gluon's 'output.weight' \(3, 5\), "
     r"PyTorch's 'fc.weight' \(3, 5\) and 'fc.bias' \(3,\)\."),
    (NET, but(LIKE, fc__bias=None), r"3 of 4 layers fit; .* at place 4: Gluon's 'output.weight' \(3, 5\) and 'output.bias' \(3,\), "
     r"PyTorch's 'fc.weight' \(3, 5\)\."),
    (but(NET, output__weight=normal(5, 3)), LIKE,
     r"shape \(3, 5\). Received: 'output.weight' of shape \(5, 3\), which is its transpose.*" r'"transpose": \[1, 0\]'),
    (but(NET, aux__weight=normal(2, 2)), LIKE,
     r"4 of 4 layers fit; .* at place 5: Gluon's 'aux.weight' \(2, 2\), PyTorch has no more"),
    ({'0.weight': normal(3, 5), '0.bias': normal(3)}, {'0.weight': np.zeros((3, 5)), '0.bias': np.zeros(4)},
     r"'0.bias' of the state_dict must have shape \(4,\). Received: '0.bias' of shape \(3,\)"),
    ({'0.weight': normal(3, 5)}, {'0.weight': np.zeros((5, 3))}, 'which is its transpose'),
    ({'0.weight': normal(3, 5), '1.gamma': normal(5)}, {'0.weight': np.zeros((3, 5))}, "'1.gamma' is left over"),
    ({'0.weight': normal(3, 5)}, {'0.weight': np.zeros((3, 5)), '0.bias': np.zeros(3)}, "'0.bias' has no parameter in the dict"),
    ({'0.gamma': normal(2)}, {'0.weight': np.zeros(4)}, '"repeat": 2'),
])
def test_what_does_not_fit_is_named(net, like, message):
    with pytest.raises(ValueError, match=message):
        model_to_torch(net, like=like)


def test_a_map_decides(tmp_path):
    (tmp_path / 'map.json').write_text(json.dumps(MAP))
    expected = model_to_torch(NET, like=LIKE)
    for model in (model_to_torch(NET, LIKE, MAP), model_to_torch(NET, names=tmp_path / 'map.json')):
        assert model.rows == expected.rows
    assert suggest_names(NET, like=LIKE) == MAP
    dropped = but(MAP, fc__bias=None, drop=['output.bias'])
    model = model_to_torch(NET, names=dropped)
    assert 'fc.bias' not in model.weights
    assert "'output.bias' in Gluon was dropped, as the map says" in model.report


@pytest.mark.parametrize('names, message', [
    (but(MAP, fc__bias='output.baas'), "Unknown parameter of the dictionary 'output.baas'. Did you mean 'output.bias'"),
    (but(MAP, fc__bias=None, fc__weight=None, drop=['output.weight']), "Gluon's 'output.bias'.*PyTorch's 'fc.weight'"),
    ({**MAP, 'fc.bias': 'features.1.beta'}, "Left over: 'output.bias'"),
    (but(MAP, fc__bias=None, drop=['output.bias']), "Missing: 'fc.bias'"),
    (but(MAP, fd__weight='output.weight'), "Unknown parameter of the state_dict 'fd.weight'. Did you mean 'fc.weight'"),
    (but(MAP, conv1__weight='features.2.weight', conv2__weight='features.0.weight'), r"'conv1.weight' .* shape \(4, 2, 3, 3\)"),
    (but(MAP, fc__weight={'from': 'output.weight', 'transpose': [1, 0]}), 'which is its transpose'),
    (but(MAP, fc__weight={'from': 'output.weight', 'transpose': [1, 2]}), "'fc.weight' in the map cannot be made"),
    (but(MAP, fc__weight={'from': 'output.weight', 'view': [7]}), "'fc.weight' in the map cannot be made"),
    (but(MAP, fc__weight={'from': 'output.weight', 'transpoes': [1, 0]}), 'transpoes'),
    (but(MAP, fc__weight={'transpose': [1, 0]}), "'fc.weight' in the map must be a Gluon name"),
    (but(MAP, fc__weight={'from': 'output.weight', 'transpose': '10'}), 'must be a list of integers'),
    (but(MAP, fc__weight={'from': 'output.weight', 'repeat': 2}), '"repeat" must be an integer'),
    (but(MAP, drop=['no.such']), "Unknown parameter of the dictionary 'no.such'"),
    ({'lstm.*': {'from': 'output.bias', 'rnn': 'lstm', 'hidden': 2}}, 'must have as many elements as a lstm of 1 layer'),
    ({'lstm.*': {'from': 'output.bias', 'rnn': 'ltsm', 'hidden': 2}}, "Did you mean 'lstm'"),
])
def test_a_wrong_map_is_refused(names, message):
    with pytest.raises(ValueError, match=message):
        model_to_torch(NET, like=LIKE, names=names)


def test_a_map_with_a_name_twice_is_refused(tmp_path):
    (tmp_path / 'map.json').write_text('{"a": "0.weight", "a": "1.weight"}')
    with pytest.raises(ValueError, match="Received twice: 'a'"):
        model_to_torch(NET, names=tmp_path / 'map.json')
    names = {'*': {'from': 'vector', 'rnn': 'rnn_tanh', 'hidden': 1}, 'bias_hh_l0': 'bias'}
    with pytest.raises(ValueError, match="Received twice: 'bias_hh_l0'"):
        model_to_torch({'vector': normal(4), 'bias': normal(1)}, names=names)
    (tmp_path / 'map.json').write_text('{"a": ')
    with pytest.raises(ValueError, match='must be JSON'):
        model_to_torch(NET, names=tmp_path / 'map.json')


def test_shared_parameters(mx, torch, tmp_path):
    """Two frameworks, one array under two names; in a checkpoint it has one."""
    class Gluon(mx.gluon.Block):
        def __init__(self):
            super().__init__()
            self.encoder = mx.gluon.nn.Embedding(7, 3)
            self.decoder = mx.gluon.nn.Dense(7, in_units=3, flatten=False, params=self.encoder.params)

        def forward(self, x):
            return self.decoder(self.encoder(x))

    class Torch(torch.nn.Module):
        def __init__(self, tie):
            super().__init__()
            self.encoder, self.decoder = torch.nn.Embedding(7, 3), torch.nn.Linear(3, 7)
            if tie:
                self.decoder.weight = self.encoder.weight

        def forward(self, x):
            return self.decoder(self.encoder(x))

    net, x = Gluon(), np.array([[1, 5]])
    expected = randomized(mx, net, x.astype('float32'))
    trainer = mx.gluon.Trainer(net.collect_params(), 'adamw')
    net.save_parameters(str(tmp_path / 'net.params'))
    go.save_checkpoint(tmp_path / 'run', net=net, trainer=trainer)
    for source in (net, tmp_path / 'net.params', tmp_path / 'run'):
        module = Torch(tie=True)
        model = model_to_torch(source, like=module)
        close(answers(torch, module, model, x), expected)
        state_dict = model.state_dict()
        assert state_dict['encoder.weight'] is state_dict['decoder.weight']
        assert any("'decoder.weight' is 'encoder.weight'" in line for line in model.report)
    assert model.states().names == ['encoder.weight', 'decoder.bias']
    assert model_to_torch(tmp_path / 'run', like=module.state_dict()).states().names == model.states().names
    parted = model_to_torch(tmp_path / 'run', like=Torch(tie=False))  # the checkpoint has the parameter once, and knows both names
    assert [row['from'] for row in parted.rows] == ['encoder.weight', 'decoder.weight', 'decoder.bias']
    assert all(np.array_equal(parted.weights[name], model.weights[name]) for name in model.weights)
    assert any("'decoder.weight' is 'encoder.weight'" in line for line in parted.report)
    with pytest.raises(ValueError, match="'decoder.weight' has no parameter in .*of its shape"):  # a dictionary may be a mistake
        model_to_torch({name: model.weights[name] for name in ('encoder.weight', 'decoder.bias')}, like=Torch(tie=False))
    names = {'encoder.weight': 'encoder.weight', 'decoder.weight': 'encoder.weight', 'decoder.bias': 'decoder.bias'}
    untied = model_to_torch(tmp_path / 'run', Torch(tie=False), names)
    assert untied.rows == model.rows
    assert untied.states().names == ['encoder.weight', 'decoder.weight', 'decoder.bias']  # each goes its own way from here
    assert len(model_to_torch(net, names={'w': 'encoder.weight', 'b': 'decoder.bias'}).weights) == 2  # the other name is the same


@pytest.fixture()
def tied_lstm(mx, torch, tmp_path):
    """Trained for a few steps: both biases of its LSTM are equal, as they always are in Gluon."""
    gluon = mx.gluon

    class Net(gluon.Block):
        def __init__(self):
            super().__init__()
            self.embed = gluon.nn.Embedding(11, 6)
            self.lstm = gluon.rnn.LSTM(3, 2, bidirectional=True, input_size=6)
            self.out = gluon.nn.Dense(11, in_units=6, flatten=False, params=self.embed.params)

        def forward(self, x):
            return self.out(self.lstm(self.embed(x)))

    net, words = Net(), np.array([[1, 5], [10, 0], [3, 3]])
    net.initialize(mx.init.Normal(0.5))
    trainer = gluon.Trainer(net.collect_params(), 'adamw', {'learning_rate': 0.05})
    for _ in range(3):
        with mx.autograd.record():
            loss = (net(mx.nd.array(words)) ** 2).sum()
        loss.backward()
        trainer.step(1)
    arrays = {name: parameter.data().asnumpy() for name, parameter in net._collect_params_with_prefix().items()}
    biases = [name for name in arrays if name.endswith('i2h_bias')]
    assert biases and all(np.array_equal(arrays[name], arrays[name.replace('i2h', 'h2h')]) for name in biases)
    net.save_parameters(str(tmp_path / 'net.params'))
    go.save_checkpoint(tmp_path / 'ck.safetensors', net=net, trainer=trainer)
    expected = net(mx.nd.array(words)).asnumpy()
    return {'block': net, 'params': tmp_path / 'net.params', 'checkpoint': tmp_path / 'ck.safetensors'}, words, expected


def torch_lstm(torch, tie, names=('embed', 'lstm', 'out'), order=(0, 1, 2)):
    layers = [torch.nn.Embedding(11, 6), torch.nn.LSTM(6, 3, 2, bidirectional=True), torch.nn.Linear(6, 11)]

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for k in order:
                setattr(self, names[k], layers[k])
            if tie:
                layers[2].weight = layers[0].weight

        def forward(self, x):
            return layers[2](layers[1](layers[0](x))[0])
    return Net()


@pytest.mark.parametrize('source', ['block', 'params', 'checkpoint'])
@pytest.mark.parametrize('tie', [True, False])
@pytest.mark.parametrize('names, order', [(('embed', 'lstm', 'out'), (0, 1, 2)), (('embed', 'lstm', 'out'), (2, 1, 0)),
                                          (('encoder', 'rnn', 'decoder'), (0, 1, 2)), (('embed', 'rnn', 'out'), (0, 1, 2)),
                                          (('embed', 'lstm', 'decoder'), (2, 0, 1))])
def test_a_tied_net_with_an_lstm(torch, tied_lstm, source, tie, names, order):
    sources, words, expected = tied_lstm
    module = torch_lstm(torch, tie, names, order)
    model = model_to_torch(sources[source], like=module)
    close(answers(torch, module, model, words), expected)
    assert list(model.weights) == list(module.state_dict())
    if source != 'params' or tie:  # a file has the values alone
        assert any('let the module share them' in line for line in model.report)
    if tie:
        weights = {row['name']: row['from'] for row in model.rows}
        assert weights[f'{names[2]}.weight'] == weights[f'{names[0]}.weight'] == 'embed.weight'
    if source == 'checkpoint':
        states = model.states()
        assert states.names == [name for name, _ in module.named_parameters()]
        optimizer = go.torch.create('adamw', module.parameters())
        optimizer.load_state_dict(go.to_torch(states))
        mean = go.read_states(sources[source]).slots['embed.weight']['mean']
        np.testing.assert_array_equal(optimizer.state[getattr(module, names[0]).weight]['exp_avg'], mean)


def test_a_file_without_the_second_name_may_be_the_likeness(torch, tied_lstm, tmp_path):
    sources, module = tied_lstm[0], torch_lstm(torch, tie=True)
    like = {name: tensor for name, tensor in module.state_dict().items() if name != 'out.weight'}  # as safetensors saves it
    model = model_to_torch(sources['params'], like=like)
    assert list(model.weights) == list(like)
    assert "'out.weight' in Gluon has the values of 'embed.weight', which was converted: it was assumed to be the same parameter" \
        in model.report
    del like['lstm.bias_hh_l0']  # has the values of the other bias, but is none of its names
    with pytest.raises(ValueError, match="'lstm.h2h|'lstm' fits none|is left over"):
        model_to_torch(sources['params'], like=like)


def test_what_is_tied_in_pytorch_must_be_equal_in_gluon(torch, tied_lstm):
    arrays = {name: normal(*array.shape) for name, array in model_to_torch(tied_lstm[0]['params']).weights.items()}
    with pytest.raises(ValueError, match="'embed.weight' and 'out.weight' are one tensor in the Net.*differ"):
        model_to_torch(arrays, like=torch_lstm(torch, tie=True))
    names = {name: name for name in arrays}
    with pytest.raises(ValueError, match='one tensor in the Net.*differ'):
        model_to_torch(arrays, torch_lstm(torch, tie=True), names)
    model_to_torch(arrays, like=torch_lstm(torch, tie=False))
    tied = but(names, out__weight=None)
    complete = suggest_names(tied_lstm[0]['params'])
    del complete['out.weight']  # the other name of what is mapped
    assert 'out.weight' in model_to_torch(tied_lstm[0]['params'], torch_lstm(torch, tie=True), complete).weights
    with pytest.raises(ValueError, match="Left over: 'out.weight'"):
        model_to_torch(arrays, torch_lstm(torch, tie=True), tied)


def test_a_draft_settles_what_the_names_settle(torch, tied_lstm):
    module = torch_lstm(torch, tie=True)
    module.further = torch.nn.Linear(6, 11)
    draft = suggest_names(tied_lstm[0]['checkpoint'], like=module)
    assert draft['lstm.bias_hh_l1_reverse'].endswith('h2h_bias')
    assert draft['embed.weight'] == 'embed.weight'
    assert draft['out.bias'] == 'out.bias'
    assert draft['further.weight'] == {'choose': ['embed.weight']}
    numbered = torch.nn.Sequential(torch.nn.LSTM(6, 3, 2, bidirectional=True))
    chosen = suggest_names(tied_lstm[0]['checkpoint'], like=numbered)['0.bias_hh_l0']['choose']
    assert len(chosen) == 1  # of the twelve that have its shape


def test_whose_weight_is_missing_is_not_guessed():
    arrays = {'a.weight': normal(4, 2), 'b.weight': normal(4, 2), 'out.bias': normal(4)}
    like = {'a.weight': np.zeros((4, 2)), 'b.weight': np.zeros((4, 2)), 'out.weight': np.zeros((4, 2)), 'out.bias': np.zeros(4)}
    with pytest.raises(ValueError, match=r"'out.weight' has no parameter .*of its shape .*'a.weight', 'b.weight'"):
        model_to_torch(Source('the checkpoint', arrays, once=True), like=like)
    del arrays['b.weight'], like['b.weight']
    assert model_to_torch(Source('the checkpoint', arrays, once=True), like=like).rows[1]['from'] == 'a.weight'


def test_names_come_before_order():
    net = {f'{name}.weight': normal(2, 2) for name in ('query', 'key', 'value')}
    like = {f'{name}.weight': np.zeros((2, 2)) for name in ('key', 'query', 'third')}
    rows = model_to_torch(net, like=like).rows
    assert [row['from'] for row in rows] == ['key.weight', 'query.weight', 'value.weight']


def test_names_that_are_no_strings_are_refused():
    with pytest.raises(TypeError, match='names of parameters must be strings. Received: 1, a int'):
        model_to_torch({1: normal(2)})


def test_a_map_does_not_both_name_and_drop():
    with pytest.raises(ValueError, match="not both. Received both: 'output.bias'"):
        model_to_torch(NET, names={**MAP, 'drop': ['output.bias']})


def test_a_reinterpretation_is_in_the_report():
    names = {'a': {'from': 'w', 'view': [3, 2]}, 'b': {'from': 'w', 'shape': [6]}}
    assert [row['how'] for row in model_to_torch({'w': normal(2, 3)}, names=names).rows] == ['seen as [3, 2]', 'shaped [6]']


def test_whole_numbers_are_said():
    model = model_to_torch({'0.weight': np.ones((2, 2), 'int32'), '0.bias': normal(2)})
    assert "'0.weight': integers, as in Gluon; PyTorch does not train them" in model.report


def test_equal_arrays_of_zeros_are_not_shared():
    with pytest.raises(ValueError, match="Left over: '1.beta'"):
        model_to_torch({'0.beta': np.zeros(2), '1.beta': np.zeros(2)}, names={'a': '0.beta'})


@pytest.mark.parametrize('source, message', [
    (3, '`source` must be'), ({}, 'there are no parameters in the dictionary'), ({'a': np.array(['x'])}, "'a' of type"),
])
def test_what_is_no_source(source, message):
    with pytest.raises((TypeError, ValueError), match=message):
        model_to_torch(source)


def test_a_deferred_net_is_refused(mx):
    net = mx.gluon.nn.Dense(2)
    net.initialize()
    with pytest.raises(ValueError, match='run one forward pass'):
        model_to_torch(net)


def test_names_that_mxnet_2_sorts_are_put_in_their_order(torch):
    """Its files are sorted: 10 comes before 2, and bias before weight."""
    arrays = {f'{k}.{leaf}': normal(*shape) for k in range(12) for leaf, shape in (('weight', (2, 2)), ('bias', (2,)))}
    module = torch.nn.Sequential(*[layer for _ in range(12) for layer in (torch.nn.Linear(2, 2), torch.nn.ReLU())])
    model = model_to_torch({name: arrays[name] for name in sorted(arrays)}, like=module)
    assert np.array_equal(model.weights['4.weight'], arrays['2.weight'])
    plain = model_to_torch({name: arrays[name] for name in sorted(arrays)}, states=states_of(**{
        name: {'mean': array} for name, array in arrays.items()}))
    assert plain.states().names == list(arrays)  # as in module.parameters()
    like = {'a.weight': np.zeros((2, 2)), 'b.weight': np.zeros((2, 2))}
    with pytest.raises(ValueError, match='may be'):  # the order of these is unknown: either could be the first
        model_to_torch({'body.weight': normal(2, 2), 'head.weight': normal(2, 2)}, like=like)
    with pytest.raises(ValueError, match='may be'):  # a trainer of 1.x sorts full names
        model_to_torch({'dense10_weight': normal(2, 2), 'dense2_weight': normal(2, 2)}, like=like)


# Files

@pytest.mark.parametrize('ending', ['.pt', '.safetensors'])
def test_saved_models_can_be_read_and_be_the_likeness(torch, tmp_path, ending):
    path = tmp_path / f'model{ending}'
    model = model_to_torch(NET, like=LIKE)
    model.save(path)
    if ending == '.pt':
        loaded = {name: tensor.numpy() for name, tensor in torch.load(path, weights_only=True).items()}
    else:
        loaded = pytest.importorskip('safetensors.numpy').load_file(path)
    assert set(loaded) == set(model.weights)
    assert all(np.array_equal(loaded[name], array) and loaded[name].dtype == array.dtype for name, array in model.weights.items())
    again = model_to_torch(NET, like=path)
    assert {row['name']: row['from'] for row in again.rows} == {row['name']: row['from'] for row in model.rows}


def test_the_order_of_a_safetensors_file_means_nothing(tmp_path):
    net = {'0.weight': normal(2, 2), '0.bias': normal(1), '1.weight': normal(2, 2), '1.bias': normal(1)}
    names = {f'{place}.{leaf}': f'{k}.{leaf}' for k, place in enumerate('ba') for leaf in ('weight', 'bias')}
    model_to_torch(net, names=names).save(tmp_path / 'like.safetensors')
    with pytest.raises(ValueError, match="'b' may be '0' or '1'"):
        model_to_torch(net, like=tmp_path / 'like.safetensors')
    model = model_to_torch(net, tmp_path / 'like.safetensors', names, states_of(**{name: {'mean': net[name]} for name in net}))
    with pytest.raises(ValueError, match="The order of the module's parameters must be known"):
        model.states()


def test_arrays_in_safetensors_are_aligned(tmp_path):
    model_to_torch({'a.weight': normal(3).astype('float16'), 'b.weight': normal(2), 'c.running_var': normal(2)}).save(
        tmp_path / 'x.safetensors')
    data = (tmp_path / 'x.safetensors').read_bytes()
    size = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:8 + size])
    assert size % 8 == 0
    assert all(header[name]['data_offsets'][0] % width == 0 for name, width in {'b.weight': 4, 'c.num_batches_tracked': 8}.items())


def test_what_is_no_likeness(torch, tmp_path):
    torch.save({'epoch': 3, 'state_dict': {}}, tmp_path / 'run.pt')
    with pytest.raises(TypeError, match="'epoch'.*Save the state_dict of the model alone"):
        model_to_torch(NET, like=tmp_path / 'run.pt')
    torch.save(torch.nn.Linear(2, 2), tmp_path / 'whole.pt')
    (tmp_path / 'other.pt').write_bytes(b'no file of anything')
    for name, message in (('whole.pt', 'Save the state_dict alone'), ('other.pt', 'must be one of torch.save')):
        with pytest.raises(ValueError, match=message):
            model_to_torch(NET, like=tmp_path / name)
    with pytest.raises(ValueError, match='must end in'):
        model_to_torch(NET).save(tmp_path / 'model.params')


# States that follow

def states_of(**slots):
    infos = [ParameterInfo(name, name, next(iter(arrays.values())).shape, 'float32') for name, arrays in slots.items()]
    return OptimizerStates('adamw', {}, 3, infos, dict.fromkeys(slots, 3), slots)


def test_states_take_the_names_the_order_and_the_layout():
    net = {'a.weight': normal(4, 3, 3, 2), 'b.bias': normal(5)}
    mean, other = normal(4, 3, 3, 2), normal(5)
    states = states_of(**{'b.bias': {'mean': other}, 'a.weight': {'mean': mean, 'norm_sq': np.array(2.0, 'float32')}})
    states.parameters[1].shape = mean.shape
    names = {'conv.weight': {'from': 'a.weight', 'transpose': [0, 3, 1, 2]}, 'conv.bias': 'b.bias'}
    followed = model_to_torch(net, names=names, states=states).states()
    assert followed.names == ['conv.weight', 'conv.bias']
    assert followed.parameters[0].shape == (4, 2, 3, 3)
    assert np.array_equal(followed.slots['conv.weight']['mean'], mean.transpose(0, 3, 1, 2))
    assert followed.slots['conv.weight']['norm_sq'] == 2
    assert followed.counts == {'conv.weight': 3, 'conv.bias': 3}
    with pytest.raises(ValueError, match="must belong to the parameters of the dictionary. Received: those of 'x'"):
        model_to_torch(net, names=names, states=states_of(x={'mean': other})).states()
    part = model_to_torch(net, names=names, states=states_of(**{'b.bias': {'mean': other}})).states()
    assert part.names == ['conv.bias']
    assert "not in the optimizer of the run: 'conv.weight'" in part.report[-1]
    with pytest.raises(ValueError, match="states of 'c.bias'"):
        model_to_torch(net, names=names, states=states_of(**states.slots, **{'c.bias': {'mean': other}})).states()
    with pytest.raises(ValueError, match='There are no optimizer states in the dictionary'):
        model_to_torch(net, names=names).states()


def test_a_state_that_cannot_follow_is_refused():
    rnn = Rnn('gru', 2)
    vector = normal(sum(int(np.prod(shape)) for _, _, shape in rnn.parts(3 * 2 * (5 + 2) + 12, '')))
    names = {'gru.*': {'from': 'gru_parameters', 'rnn': 'gru', 'hidden': 2}}
    mean = normal(*vector.shape)
    followed = model_to_torch({'gru_parameters': vector}, None, names, states_of(gru_parameters={'mean': mean})).states()
    assert np.array_equal(np.concatenate([followed.slots[name]['mean'].ravel() for name in followed.names]), mean)
    one_number = states_of(gru_parameters={'mean': mean, 'norm_sq': np.array(2.0)})
    model = model_to_torch({'gru_parameters': vector}, None, names, one_number)
    with pytest.raises(ValueError, match="'norm_sq' is one number for the whole vector.*allow_lossy"):
        model.states()
    lossy = model.states(allow_lossy=True)
    assert not lossy.slots
    assert 'lost: ' in lossy.report[-1]
    names, states = {'weight': {'from': 'gamma', 'repeat': 2}}, states_of(gamma={'mean': normal(2)})
    repeated = model_to_torch({'gamma': normal(2)}, None, names, states)
    with pytest.raises(ValueError, match='its elements are repeated'):
        repeated.states()


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_a_run_goes_on_with_weights_and_states(mx, torch, tmp_path, dtype):
    """Half-way through, with other names in PyTorch; masters become the weights."""
    gluon, nn = mx.gluon, torch.nn
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Dense(4, in_units=3), gluon.nn.BatchNorm(in_channels=4), gluon.nn.Dense(2, in_units=4))
    net.initialize(mx.init.Normal(0.5))
    module = nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    x, target = normal(8, 3), normal(8, 2)
    if dtype == 'float16':
        net[0].cast('float16')
        net[2].cast('float16')
    trainer = gluon.Trainer(net.collect_params(), 'novograd', {'learning_rate': 0.05, 'wd': 0.01, 'multi_precision': True})

    def single(layer, value):  # a Dense in float32 whatever its parameters are stored in: MXNet has no float16 product on the CPU
        weight, bias = (parameter.data().astype('float32') for parameter in (layer.weight, layer.bias))
        return mx.nd.FullyConnected(value, weight, bias, num_hidden=weight.shape[0])

    def gluon_step():
        with mx.autograd.record():
            loss = ((single(net[2], net[1](single(net[0], mx.nd.array(x)))) - mx.nd.array(target)) ** 2).sum(axis=1)
        loss.backward()
        trainer.step(len(x))
        return float(loss.mean().asscalar())

    for _ in range(3):
        gluon_step()
    go.save_checkpoint(tmp_path / 'run', net=net, trainer=trainer)
    model = model_to_torch(tmp_path / 'run', like=module)
    assert {array.dtype.name for array in model.weights.values()} == {'float32', 'int64'}
    assert int(model.weights['2.num_batches_tracked']) == 3
    module.load_state_dict(model.state_dict())
    states = model.states()
    optimizer = go.torch.create(states.optimizer, module.parameters())
    optimizer.load_state_dict(go.to_torch(states))
    assert states.names == [name for name, _ in module.named_parameters()]

    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = ((module(torch.from_numpy(x)) - torch.from_numpy(target)) ** 2).sum(axis=1).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tolerance = 1e-5 if dtype == 'float32' else 2e-3  # the weights of the forward pass are rounded in Gluon
    np.testing.assert_allclose(losses, [gluon_step() for _ in losses], rtol=tolerance)


def test_running_variances_differ_as_the_report_says(mx, torch):
    """By n / (n - 1), n values per channel: exact when converted, and not after a further step."""
    x = normal(4, 3, 2, 2)
    net, module = mx.gluon.nn.BatchNorm(in_channels=3), torch.nn.BatchNorm2d(3)
    net.initialize()
    with mx.autograd.record():
        loss = net(mx.nd.array(x)).sum()
    loss.backward()
    module(torch.from_numpy(x))
    ours, theirs = net.running_var.data().asnumpy() - 0.9, module.running_var.numpy() - 0.9
    np.testing.assert_allclose(theirs / ours, 16 / 15, rtol=1e-4)
    np.testing.assert_allclose(module.running_mean, net.running_mean.data().asnumpy(), rtol=1e-4, atol=1e-7)
    assert any('unbiased variance' in line for line in model_to_torch(net).report)


def test_a_fixed_gamma_is_one_and_has_no_state(mx, torch, tmp_path):
    net = mx.gluon.nn.HybridSequential()
    net.add(mx.gluon.nn.Dense(4, in_units=3), mx.gluon.nn.BatchNorm(scale=False, in_channels=4))
    net.initialize()
    net[1].gamma.set_data(mx.nd.full(4, 3))
    assert (model_to_torch(net).weights['1.weight'] == 1).all()
    trainer = mx.gluon.Trainer(net.collect_params(), 'adamw')
    with mx.autograd.record():
        loss = (net(mx.nd.array(normal(5, 3))) ** 3).sum()
    loss.backward()
    trainer.step(1)
    go.save_checkpoint(tmp_path / 'run', net=net, trainer=trainer)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    states = model_to_torch(tmp_path / 'run', like=module).states()
    optimizer = go.torch.create('adamw', module.parameters())
    optimizer.load_state_dict(go.to_torch(states))
    mean = go.read_states(tmp_path / 'run').slots['1.beta']['mean']
    np.testing.assert_array_equal(optimizer.state[module[1].bias]['exp_avg'], mean)
    assert '1.weight' not in states.slots


def test_masters_are_the_weights(torch):
    weight, master = normal(2, 3).astype('float16'), normal(2, 3)
    states = states_of(**{'0.weight': {'mean': normal(2, 3)}})
    states.master['0.weight'] = master
    for module, dtype in ((torch.nn.Linear(3, 2, bias=False), 'float32'), (torch.nn.Linear(3, 2, bias=False).half(), 'float16')):
        model = model_to_torch({'0.weight': weight}, like=torch.nn.Sequential(module), states=states)
        assert np.array_equal(model.weights['0.weight'], master)
        followed = model.states()
        assert followed.parameters[0].dtype == dtype
        assert list(followed.master) == (['0.weight'] if dtype == 'float16' else [])  # where the module cannot hold them
    states.master['0.weight'] = master[:1]
    with pytest.raises(ValueError, match=r"The master of '0.weight' must have the shape of the weight, \(2, 3\)"):
        model_to_torch({'0.weight': weight}, states=states)


# The command

def run(capsys, *arguments, code=0):
    assert cli.main(['convert', *map(str, arguments)]) == code
    said = capsys.readouterr()
    return said.err if code else said.out


@pytest.fixture()
def params():
    return FIXTURES / '1.9.1/text.params'


def test_the_command_writes_a_state_dict(torch, tmp_path, capsys, params):
    output, report = tmp_path / 'text.pt', tmp_path / 'report.json'
    said = run(capsys, params, '--to', 'torch', '-o', output, '--report', report)
    assert '_unfused.0.l_cell.i2h_weight' in said
    module = torch.nn.Sequential(torch.nn.Embedding(7, 5), torch.nn.LSTM(5, 3, 2, bidirectional=True), torch.nn.LayerNorm(6),
                                 torch.nn.Linear(6, 4))
    module.load_state_dict(torch.load(output, weights_only=True))
    rows = json.loads(report.read_text())
    assert rows['what'] == 'model'
    assert rows['parameters'][0] == {'name': '0.weight', 'from': '0.weight', 'shape': [7, 5], 'dtype': 'float32',
                                     'how': 'unchanged'}
    assert json.loads(run(capsys, params, '--to', 'torch', '-o', output, '--force', '--json')) == rows


def test_the_command_drafts_a_map(torch, tmp_path, capsys, params):
    draft, like, output = tmp_path / 'map.json', tmp_path / 'like.pt', tmp_path / 'out.safetensors'
    torch.save(text_module(torch.nn).state_dict(), like)
    run(capsys, params, '--to', 'torch', '--like', like, '--map', 'suggest', '-o', draft)
    names = json.loads(draft.read_text())
    assert names['4.bias'] == '3.bias'
    run(capsys, params, '--to', 'safetensors', '--like', like, '--map', draft, '-o', output)
    names['4.bias'] = '3.weight'
    draft.write_text(json.dumps(names))
    other = tmp_path / 'other.safetensors'
    error = run(capsys, params, '--to', 'safetensors', '--like', like, '--map', draft, '-o', other, code=1)
    assert "Left over: '3.bias'" in error
    assert not other.exists()


@pytest.mark.parametrize('options, message, code', [
    (['--to', 'onnx', '--map', 'suggest'], '--map goes with --to torch', 2),
    (['--to', 'safetensors', '--what', 'optimizer', '-o', 'x.safetensors'], 'the weights of a model. For the optimizer', 2),
    (['--to', 'torch', '--verify', '3', '-o', 'x.pt'], '--verify is for optimizer states', 2),
    (['--to', 'torch', '--map', 'absent.json', '-o', 'x.pt'], 'absent.json', 2),
    (['--to', 'torch', '--like', 'absent.pt', '-o', 'x.pt'], 'absent.pt', 2),
])
def test_the_command_refuses(tmp_path, monkeypatch, capsys, params, options, message, code):
    params = params.resolve()
    monkeypatch.chdir(tmp_path)
    assert message in run(capsys, params, *options, code=code)
    assert not list(tmp_path.iterdir())


def test_the_command_takes_either_half_of_a_checkpoint(mx, torch, tmp_path, capsys):
    net = mx.gluon.nn.HybridSequential()
    net.add(mx.gluon.nn.Dense(4, in_units=3), mx.gluon.nn.Dense(2, in_units=4))
    net.initialize()
    trainer = mx.gluon.Trainer(net.collect_params(), 'novograd')
    with mx.autograd.record():
        loss = net(mx.nd.ones((1, 3))).sum()
    loss.backward()
    trainer.step(1)
    go.save_checkpoint(tmp_path / 'run.safetensors', net=net, trainer=trainer)
    go.save_states(trainer, tmp_path / 'run.states', net=net)
    net.save_parameters(str(tmp_path / 'run.params'))
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    like = tmp_path / 'like.pt'
    torch.save(module.state_dict(), like)

    run(capsys, tmp_path / 'run.safetensors', '--to', 'torch', '--what', 'model', '--like', like, '-o', tmp_path / 'model.pt')
    module.load_state_dict(torch.load(tmp_path / 'model.pt', weights_only=True))
    np.testing.assert_array_equal(module[2].weight.detach(), net[1].weight.data().asnumpy())
    optimizers = []
    for options in ([tmp_path / 'run.safetensors'], [tmp_path / 'run.states', '--params', tmp_path / 'run.params']):
        output = tmp_path / f'{len(optimizers)}.pt'
        run(capsys, *options, '--to', 'torch', '--like', like, '-o', output)
        optimizer = go.torch.create('novograd', module.parameters())
        optimizer.load_state_dict(torch.load(output, weights_only=True))
        optimizers.append(optimizer)
    states = go.read_states(tmp_path / 'run.states')
    for optimizer in optimizers:
        np.testing.assert_array_equal(optimizer.state[module[2].bias]['exp_avg'], states.slots['1.bias']['mean'])
    error = run(capsys, tmp_path / 'run.states', '--to', 'safetensors', '--params', tmp_path / 'run.params', '-o', tmp_path / 'x',
                code=2)
    assert '--to mxnet, which makes a safetensors file of gluon_optim that holds states' in error
    trainer.save_states(str(tmp_path / 'old.states'))
    error = run(capsys, tmp_path / 'old.states', '--to', 'safetensors', '--params', tmp_path / 'run.params', code=2)
    assert '--to mxnet, which makes a safetensors file of gluon_optim that holds states' in error
    refusal = run(capsys, tmp_path / 'run.states', '--to', 'torch', '--like', like, '-o', tmp_path / 'x.pt', code=1)
    assert 'also need the weights' in refusal
    assert not (tmp_path / 'x.pt').exists()
