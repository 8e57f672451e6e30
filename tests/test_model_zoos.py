"""Nets of Gluon's model zoo and GluonCV for torchvision's: what matches in order, the first difference where not, partial maps."""
import json
from pathlib import Path

import numpy as np
import pytest
import work

import gluon_optim as go
from gluon_optim import cli
from gluon_optim.models import model_to_torch, suggest_names
from gluon_optim.models.gluon import Facts, Source
from gluon_optim.states.model import OptimizerStates, ParameterInfo

FIXTURES = Path(__file__).parent / 'models'
TORCHVISION = json.loads((FIXTURES / 'torchvision.json').read_text())['nets']
GLUONCV = json.loads((FIXTURES / 'gluoncv.json').read_text())
RANDOM = np.random.default_rng(0)


def normal(*shape):
    return RANDOM.normal(size=shape).astype('float32')


def arrays(shapes, shared=()):
    """Arrays without memory of their own; each holds one number, which says where it came from."""
    numbers = {name: k for k, name in enumerate(shapes)}
    numbers.update((name, numbers[first]) for name, first in dict(shared).items())
    return {name: np.broadcast_to(np.float32(numbers[name]), shape) for name, shape in shapes.items()}


def like(name):
    return arrays(TORCHVISION[name])


def gluoncv(name):
    return arrays(GLUONCV['nets'][name], GLUONCV['shared'][name])


def zoo(name):
    """A net of Gluon's zoo, with the shapes that images of 224 x 224 give it."""
    mx = pytest.importorskip('mxnet')
    net = getattr(mx.gluon.model_zoo.vision, name)()
    symbol = net(mx.sym.var('data'))
    arguments, _, states = symbol.infer_shape(data=(1, 3, 224, 224))
    shapes = {**dict(zip(symbol.list_arguments(), arguments)), **dict(zip(symbol.list_auxiliary_states(), states))}
    return arrays({key: shapes[parameter.name] for key, parameter in net._collect_params_with_prefix().items()})


def pairs(model):
    """PyTorch's names to Gluon's, of the weights."""
    return {row['name']: row['from'] for row in model.rows if row['from']}


def refusal(source, target, names=None):
    with pytest.raises(ValueError) as caught:
        model_to_torch(source, target, names)
    message = str(caught.value)
    assert len(message) < 500 and 'suggest_names' in message  # a few lines
    return message


@pytest.mark.parametrize('name', ['alexnet', 'densenet121', 'squeezenet1_1', 'vgg16_bn'])
def test_nets_that_match_in_order(name):
    source, target = zoo(name), like(name)
    model = model_to_torch(source, target)
    assert list(model.weights) == list(target)
    assert list(pairs(model).values()) == list(source)  # both define their layers, and each layer its arrays, in one order
    assert all(model.weights[theirs].flat[0] == source[ours].flat[0] for theirs, ours in pairs(model).items())


@pytest.mark.parametrize('net, name, difference', [
    ('resnet50_v1', 'resnet50', "2 of 107 layers fit; the first difference in order is at place 3: Gluon's "
     "'features.4.0.body.0.weight' (64, 64, 1, 1) and 'features.4.0.body.0.bias' (64,), "
     "PyTorch's 'layer1.0.conv1.weight' (64, 64, 1, 1)."),
    ('resnet50_v2', 'resnet50', "Received: at place 1: Gluon's 'features.0.gamma' (3,) and 'features.0.beta' (3,) and 2 more, "
     "PyTorch's 'conv1.weight' (64, 3, 7, 7)."),
    ('mobilenet_v2_1_0', 'mobilenet_v2', "2 of 105 layers fit; the first difference in order is at place 3: Gluon's "
     "'features.3.out.0.weight' (32, 32, 1, 1), PyTorch's 'features.1.conv.0.0.weight' (32, 1, 3, 3)."),
    ('vgg16', 'vgg16_bn', "1 of 29 layers fit; the first difference in order is at place 2: Gluon's 'features.2.weight' "
     "(64, 64, 3, 3) and 'features.2.bias' (64,), PyTorch's 'features.1.weight' (64,) and 'features.1.bias' (64,) and 2 more."),
])
def test_nets_of_the_zoo_that_differ_say_where_first(net, name, difference):
    assert difference in refusal(zoo(net), like(name))


@pytest.mark.parametrize('name, difference', [
    ('mobilenet_v3_small', "86 of 88 layers fit; the first difference in order is at place 87: Gluon's 'features.18.weight' "
     "(1280, 576, 1, 1), PyTorch's 'classifier.0.weight' (1024, 576) and 'classifier.0.bias' (1024,)."),
    ('googlenet', "114 of 123 layers fit; the first difference in order is at place 115: Gluon's 'head.2.weight' (1000, 1024) and "
     "'head.2.bias' (1000,), PyTorch's 'aux1.conv.conv.weight' (128, 512, 1, 1)."),
])
def test_nets_of_gluoncv_that_differ_say_where_first(name, difference):
    assert difference in refusal(gluoncv(name), like(name))


def test_a_draft_is_settled_up_to_the_first_difference():
    source, target = gluoncv('mobilenet_v3_small'), like('mobilenet_v3_small')
    draft = suggest_names(source, target)
    open_ones = [name for name, entry in draft.items() if isinstance(entry, dict) and 'choose' in entry]
    assert open_ones == ['classifier.0.weight', 'classifier.0.bias', 'classifier.3.weight', 'classifier.3.bias']
    assert draft['classifier.3.bias'] == {'choose': ['output.0.bias']}
    assert draft['features.12.1.running_var'] == 'features.15.running_var'


def test_the_last_layer_of_mobilenet_v2():
    """A convolution without bias in GluonCV, a linear layer with one in torchvision."""
    source, target = gluoncv('mobilenet_v2_1.0'), like('mobilenet_v2')
    model = model_to_torch(source, target)
    *others, weight, bias = pairs(model).values()
    assert [*others, weight] == list(source) and bias == weight == 'output.0.weight'
    assert model.weights['classifier.1.weight'].shape == (1000, 1280)
    assert (model.weights['classifier.1.weight'] == source[weight].flat[0]).all()
    assert model.weights['classifier.1.bias'].shape == (1000,) and not model.weights['classifier.1.bias'].any()
    assert model.frozen == ['classifier.1.bias']
    report = '\n'.join(model.report)
    assert "'classifier.1.weight': a 1x1 convolution in one framework is a linear layer in the other" in report
    assert "'classifier.1.bias': zeros, for a layer that has no bias in Gluon" in report
    names = suggest_names(source, target)
    assert names['classifier.1.weight'] == {'from': 'output.0.weight', 'shape': [1000, 1280]}
    assert names['classifier.1.bias'] == {'from': 'output.0.weight', 'zeros': True}
    part = {name: names[name] for name in ('classifier.1.bias', 'features.0.0.weight')}
    assert model_to_torch(source, target, names).rows == model_to_torch(source, target, part).rows == model.rows


# Partial maps

def test_a_partial_map_tells_what_the_other_net_lacks(tmp_path):
    """GoogLeNet without its auxiliary heads; GluonCV's last layer has two names."""
    source = gluoncv('googlenet')
    target = {name: array for name, array in like('googlenet').items() if not name.startswith('aux')}
    said = refusal(source, target)
    assert "at place 116: Gluon's 'output.weight' (1000, 1024) and 'output.bias' (1000,), PyTorch has no more" in said
    model = model_to_torch(source, target, {'drop': ['head.2.weight', 'head.2.bias']})
    assert list(model.weights) == list(target)
    assert list(pairs(model).values()) == [name for name in source if not name.startswith('head')]
    path = tmp_path / 'map.json'
    path.write_text(json.dumps({'fc.weight': 'head.2.weight', 'fc.bias': 'head.2.bias', 'drop': ['output.weight', 'output.bias']}))
    assert pairs(model_to_torch(source, target, path))['fc.bias'] == 'head.2.bias'
    said = refusal(source, like('googlenet'), {'drop': ['head.2.weight', 'head.2.bias']})
    assert "place 115: Gluon's 'output.weight' (1000, 1024)" in said and "PyTorch's 'aux1.conv.conv.weight' (128, 512, " in said


SOURCE = {'stem.weight': normal(3, 3), 'body.weight': normal(3, 3), 'head.weight': normal(3, 3), 'extra.bias': normal(3)}
TARGET = {name: np.zeros((3, 3), 'float32') for name in ('2.weight', '1.weight', '3.weight')}


def test_a_partial_map_is_completed_in_order():
    model = model_to_torch(SOURCE, TARGET, {'2.weight': 'body.weight', 'drop': ['extra.bias']})
    assert pairs(model) == {'2.weight': 'body.weight', '1.weight': 'stem.weight', '3.weight': 'head.weight'}
    assert list(model.weights) == list(TARGET)
    assert model.report[0].startswith('2 layers have other names')  # those that rest on their order
    complete = {'2.weight': 'body.weight', '1.weight': 'stem.weight', '3.weight': 'head.weight', 'drop': ['extra.bias']}
    assert not any('other names' in line for line in model_to_torch(SOURCE, TARGET, complete).report)


def test_a_partial_map_is_completed_by_name():
    target = {'head.weight': np.zeros((3, 3)), 'top.weight': np.zeros((3, 3)), 'body.weight': np.zeros((3, 3))}
    model = model_to_torch(SOURCE, target, {'top.weight': 'stem.weight', 'drop': ['extra.bias']})
    assert pairs(model) == {'head.weight': 'head.weight', 'top.weight': 'stem.weight', 'body.weight': 'body.weight'}


def test_names_are_read_alike_when_few_are_left():
    """``embed_weight`` is an array of the net itself, as the dot in a name that the map took says."""
    source = {'a.weight': normal(2, 2), 'embed_weight': normal(3)}
    target = {'x.weight': np.zeros((2, 2)), 'embed_weight': np.zeros(3)}
    assert pairs(model_to_torch(source, target, {'x.weight': 'a.weight'}))['embed_weight'] == 'embed_weight'


@pytest.mark.parametrize('names, message', [
    ({'2.weight': 'body.weight'}, "besides those in the map, 2 of 2 layers fit; the first difference in order is at place "
     "3: Gluon's 'extra.bias' (3,), PyTorch has no more"),
    ({'2.weight': 'body.weight', 'drop': ['head.weight', 'extra.bias']}, "Gluon has no more, PyTorch's '3.weight' (3, 3)"),
    ({'2.weight': 'body.weight', '1.weight': 'stem.weight', '3.weight': 'head.weight'}, "Left over: 'extra.bias'"),
    ({'2.weight': 'body.weight', 'drop': ['stem.weight', 'head.weight', 'extra.bias']}, "Missing: '1.weight', '3.weight'"),
    ({'4.weight': 'body.weight'}, "Unknown parameter of the state_dict '4.weight'"),
    ({'2.weight': 'extra.bias'}, r"'2.weight' of the state_dict must have shape (3, 3). Received: 'extra.bias' of shape (3,)"),
])
def test_what_a_partial_map_leaves_must_match(names, message):
    with pytest.raises(ValueError) as caught:
        model_to_torch(SOURCE, TARGET, names)
    assert message in str(caught.value)


def test_without_a_likeness_a_map_is_complete():
    with pytest.raises(ValueError, match="Left over: 'body.weight', 'head.weight', 'extra.bias'"):
        model_to_torch(SOURCE, names={'x.weight': 'stem.weight'})


@pytest.mark.parametrize('chosen', ['encoder.weight', 'decoder.weight'])
@pytest.mark.parametrize('tie', [True, False])
def test_a_partial_map_and_a_shared_parameter(chosen, tie):
    torch = pytest.importorskip('torch')
    weight, bias = normal(7, 3), normal(7)
    source = {'encoder.weight': weight, 'decoder.weight': weight, 'decoder.bias': bias}
    module = torch.nn.ModuleDict({'first': torch.nn.Embedding(7, 3), 'last': torch.nn.Linear(3, 7)})
    if tie:
        module['last'].weight = module['first'].weight
    name = {'encoder.weight': 'first.weight', 'decoder.weight': 'last.weight'}[chosen]
    model = model_to_torch(source, module, {name: chosen})
    assert all(np.array_equal(model.weights[key], array) for key, array in
               {'first.weight': weight, 'last.weight': weight, 'last.bias': bias}.items())
    if tie:
        assert pairs(model)['first.weight'] == pairs(model)['last.weight']


SHARED = {'decoder.weight': 'encoder.weight'}


@pytest.mark.parametrize('shared', [SHARED, {}], ids=['known', 'equal'])
@pytest.mark.parametrize('chosen, other', [('encoder.weight', 'decoder.weight'), ('decoder.weight', 'encoder.weight')])
def test_either_name_of_a_shared_parameter_may_be_in_the_map(shared, chosen, other):
    weight = normal(7, 3)
    found = {'encoder.weight': weight, 'decoder.weight': weight, 'decoder.bias': normal(7)}
    source = Source('the net', found, shared=shared, facts=Facts(order=list(found))) if shared else found
    target = {'w.weight': np.zeros((7, 3)), 'b.bias': np.zeros(7)}
    model = model_to_torch(source, target, {'w.weight': chosen})
    assert pairs(model) == {'w.weight': chosen, 'b.bias': 'decoder.bias'}
    report = '\n'.join(model.report)  # what became of the other name is said
    assert (f'{other!r} in Gluon is {chosen!r}' if shared else f'{other!r} in Gluon has the values of {chosen!r}') in report


@pytest.mark.parametrize('name', ['first.weight', 'last.weight'])
def test_either_name_of_a_tied_parameter_may_be_in_the_map(name):
    torch = pytest.importorskip('torch')
    source = {'encoder.weight': normal(7, 3), 'decoder.bias': normal(7)}
    module = torch.nn.ModuleDict({'first': torch.nn.Embedding(7, 3), 'last': torch.nn.Linear(3, 7)})
    module['last'].weight = module['first'].weight
    model = model_to_torch(source, module, {name: 'encoder.weight'})
    assert pairs(model) == {'first.weight': 'encoder.weight', 'last.weight': 'encoder.weight', 'last.bias': 'decoder.bias'}
    assert model_to_torch(source, module, {name: 'encoder.weight', 'last.bias': 'decoder.bias'}).rows == model.rows


def test_the_command_takes_a_partial_map(tmp_path, capsys):
    torch = pytest.importorskip('torch')
    np.savez(tmp_path / 'source.npz', **SOURCE)
    torch.save({name: torch.from_numpy(array) for name, array in TARGET.items()}, tmp_path / 'like.pt')
    (tmp_path / 'map.json').write_text(json.dumps({'2.weight': 'body.weight', 'drop': ['extra.bias']}))
    arguments = ['convert', tmp_path / 'source.npz', '--to', 'torch', '--like', tmp_path / 'like.pt', '-o', tmp_path / 'out.pt']
    assert cli.main([*map(str, arguments)]) == 1
    said = capsys.readouterr().err
    assert "Gluon's 'extra.bias' (3,), PyTorch has no more" in said and 'with --map suggest' in said and 'as --map.' in said
    assert cli.main([*map(str, arguments), '--map', str(tmp_path / 'map.json')]) == 0
    loaded = torch.load(tmp_path / 'out.pt', weights_only=True)
    assert np.array_equal(loaded['1.weight'], SOURCE['stem.weight']) and np.array_equal(loaded['2.weight'], SOURCE['body.weight'])


@pytest.mark.parametrize('net, like, message', [
    ({'0.weight': normal(2, 2)}, {'a.weight': np.zeros((2, 2)), 'b.weight': np.zeros((2, 2))}, "only '0' fits 'a' and 'b'"),
    ({'0.weight': normal(2, 2), '1.weight': normal(2, 2), '2.weight': normal(2, 2)}, {'a.weight': np.zeros((2, 2))},
     "'a' may be '0' or '1' or ...."),
    ({'0.weight': normal(2, 2)}, {'a.weight': np.zeros((2, 2)), 'b.bias': np.zeros(2)}, "PyTorch's 'b.bias' (2,) fits none"),
    ({'0.weight': normal(2, 2), '1.bias': normal(2)}, {'a.weight': np.zeros((2, 2))}, "Gluon's '1.bias' (2,) fits none"),
])
def test_the_first_difference_without_an_order(tmp_path, net, like, message):
    """A safetensors file has its arrays in an order of its own."""
    model_to_torch(like).save(tmp_path / 'like.safetensors')
    assert f'Received: {message}' in refusal(net, tmp_path / 'like.safetensors')


@pytest.mark.parametrize('case', ['equal shapes', 'shapes that occur once'])
def test_a_likeness_of_many_layers_without_an_order_takes_linear_time(case):
    """Of what a file may say: thousands of layers of one shape, or of shapes that cost nothing."""
    def of(count):
        shapes = [(2, 0) if case == 'equal shapes' else (k, 0) for k in range(count)]
        source = {f'a{k:05}.weight': np.zeros(shape, 'float32') for k, shape in enumerate(shapes)}  # sorted: of unknown order
        target = {f'b{k:05}.weight': np.zeros(shapes[k], 'float32') for k in reversed(range(count))}

        def match():
            if case == 'equal shapes':
                refusal(source, target)
            else:
                model_to_torch(source, target)
        return match

    work.assert_linear(of, 1000)


# 1x1 convolutions and linear layers

def test_shapes_of_their_own_go_first():
    """A linear layer is not made of a convolution where there is one of its shape."""
    source = {'head.weight': normal(4, 3), 'conv.weight': normal(4, 3, 1, 1)}
    target = {'x.weight': np.zeros((4, 3, 1, 1)), 'y.weight': np.zeros((4, 3))}
    reverse = {'y.weight': np.zeros((4, 3)), 'x.weight': np.zeros((4, 3, 1, 1))}
    sorted_names = {name: source[name] for name in sorted(source)}  # of unknown order
    for wanted in (target, reverse):
        assert pairs(model_to_torch(sorted_names, wanted)) == {'x.weight': 'conv.weight', 'y.weight': 'head.weight'}


@pytest.mark.parametrize('shape, wanted', [((4, 3, 1, 1), (4, 3)), ((4, 3), (4, 3, 1, 1)), ((4, 3, 1), (4, 3)),
                                           ((4, 3), (4, 3, 1))])
def test_states_follow_a_reshaped_weight(shape, wanted):
    weight, mean = normal(*shape), normal(*shape)
    states = OptimizerStates('adamw', {}, 3, [ParameterInfo('a.weight', 'a.weight', shape, 'float32')], {'a.weight': 3},
                             {'a.weight': {'mean': mean, 'norm_sq': np.float32(2)}})
    model = model_to_torch({'a.weight': weight}, {'b.weight': np.zeros(wanted, 'float32')}, states=states)
    followed = model.states()
    assert np.array_equal(model.weights['b.weight'], weight.reshape(wanted))
    assert followed.parameters[0].shape == wanted and followed.counts == {'b.weight': 3}
    assert np.array_equal(followed.slots['b.weight']['mean'], mean.reshape(wanted))
    assert followed.slots['b.weight']['norm_sq'] == 2
    states.slots['a.weight']['columns'] = normal(*shape[1:])
    with pytest.raises(ValueError, match="'columns' follows the axes of the weight, which change. Pass allow_lossy"):
        model.states()


def test_a_linear_layer_has_no_layout_to_ask_for():
    source = {'0.weight': normal(8, 3, 3, 5), '1.weight': normal(4, 8)}  # channels last, and a linear layer
    model = model_to_torch(source, {'0.weight': np.zeros((8, 5, 3, 3)), '1.weight': np.zeros((4, 8, 1, 1))})
    assert [row['how'] for row in model.rows] == ['transposed [0, 3, 1, 2]', 'shaped [4, 8, 1, 1]']


@pytest.mark.parametrize('shape, wanted', [((4, 3, 2, 1), (4, 6)), ((4, 3, 1, 1), (3, 4)), ((4, 1, 1), (4,))])
def test_other_shapes_are_not_reshaped(shape, wanted):
    with pytest.raises(ValueError, match='must have shape|at place 1'):
        model_to_torch({'a.weight': normal(*shape)}, {'b.weight': np.zeros(wanted)})


@pytest.mark.parametrize('entry', [{'shape': [3]}, {'ones': True}, {'repeat': 2}])
def test_zeros_in_a_map_go_alone(entry):
    names = {'fc.bias': {'from': 'conv.weight', 'zeros': True, **entry}}
    with pytest.raises(ValueError, match='"zeros" of \'fc.bias\' in the map .* needs only "from"'):
        model_to_torch({'conv.weight': normal(3, 2, 1, 1)}, names=names)


def test_a_run_continues_with_a_linear_layer(tmp_path):
    """MobileNetV2's last layer: trained in Gluon as a convolution, and on as a linear layer; equal until the end."""
    mx, torch = pytest.importorskip('mxnet'), pytest.importorskip('torch')
    mx.random.seed(0)
    nn = mx.gluon.nn
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3, use_bias=False), nn.GlobalAvgPool2D(), nn.Conv2D(5, 1, use_bias=False), nn.Flatten())
    net.initialize(mx.init.Normal(0.5))
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3, bias=False), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
                                 torch.nn.Linear(4, 5))
    x, target = normal(6, 2, 5, 5), normal(6, 5)
    trainer = mx.gluon.Trainer(net.collect_params(), 'adamw', {'learning_rate': 0.05, 'wd': 0.01})

    def gluon_step():
        with mx.autograd.record():
            loss = ((net(mx.nd.array(x)) - mx.nd.array(target)) ** 2).sum(axis=1)
        loss.backward()
        trainer.step(len(x))
        return float(loss.mean().asscalar())

    for _ in range(3):
        gluon_step()
    go.save_checkpoint(tmp_path / 'run', net=net, trainer=trainer)
    model = model_to_torch(tmp_path / 'run', like=module)
    module.load_state_dict(model.state_dict())
    np.testing.assert_allclose(module(torch.from_numpy(x)).detach().numpy(), net(mx.nd.array(x)).asnumpy(), rtol=1e-4, atol=1e-6)
    states = model.states()
    assert states.names == [name for name, _ in module.named_parameters()]
    assert '3.bias' not in states.slots and states.counts['3.bias'] == 0
    optimizer = go.torch.create('adamw', model.freeze(module).parameters())
    optimizer.load_state_dict(go.to_torch(states))
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = ((module(torch.from_numpy(x)) - torch.from_numpy(target)) ** 2).sum(axis=1).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(losses, [gluon_step() for _ in losses], rtol=1e-5)
    assert not module[3].bias.detach().any()
