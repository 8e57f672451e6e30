"""What a net tells besides its arrays: fix_gamma, epsilon, what is frozen, what is shared."""
import json

import numpy as np
import pytest

mx = pytest.importorskip('mxnet')
torch = pytest.importorskip('torch')

from mxnet import autograd, gluon  # noqa: E402

import gluon_optim as go  # noqa: E402
from gluon_optim import cli  # noqa: E402

# MXNet infers types without the data's
pytestmark = pytest.mark.filterwarnings('ignore:Cannot decide type')

nn = gluon.nn
X = mx.nd.array(np.random.RandomState(0).randn(8, 4))


def step(net, trainer, steps=1):
    for _ in range(steps):
        with autograd.record():
            loss = (net(X) ** 2).mean()
        loss.backward()
        trainer.step(1)


def symbol_block(folder, prefix='', fix_gamma=True):
    """A net that was made by MXNet's symbolic interface, imported."""
    hidden = mx.sym.BatchNorm(mx.sym.Variable('data'), name=prefix + 'b', eps=2e-5, fix_gamma=fix_gamma, momentum=0.5)
    symbol = mx.sym.FullyConnected(hidden, num_hidden=3, name=prefix + 'fc')
    rng = np.random.RandomState(1)
    arguments = {'b_gamma': np.full(4, 1.25), 'b_beta': rng.randn(4), 'fc_weight': rng.randn(3, 4), 'fc_bias': rng.randn(3)}
    states = {'b_moving_mean': np.zeros(4), 'b_moving_var': np.ones(4)}
    arrays = [{prefix + name: mx.nd.array(value) for name, value in values.items()} for values in (arguments, states)]
    mx.model.save_checkpoint(str(folder / 'net'), 0, symbol, *arrays)
    return gluon.SymbolBlock.imports(str(folder / 'net-symbol.json'), ['data'], str(folder / 'net-0000.params'))


@pytest.mark.parametrize('prefix', ['', 'net0_'])
def test_a_symbol_block_and_its_checkpoint_tell_fix_gamma_and_epsilon(tmp_path, prefix):
    net = symbol_block(tmp_path, prefix)
    trainer = gluon.Trainer(net.collect_params(), 'adamw', {'wd': 0.1})
    step(net, trainer, 2)
    go.save_checkpoint(tmp_path / 'run', net=net, trainer=trainer)
    states = go.read_states(tmp_path / 'run')
    assert states.facts == {'fix_gamma': ['b_gamma'], 'epsilon': {'b_gamma': 2e-5}, 'momentum': {'b_gamma': 0.5},
                            'channels_last': [], 'packed': {}, 'shared': {}, 'unknown': []}
    like = torch.nn.Sequential(torch.nn.BatchNorm1d(4, eps=2e-5, momentum=0.5), torch.nn.Linear(4, 3))
    for source in (net, tmp_path / 'run'):
        model = go.model_to_torch(source, like=like)
        assert "give the layer of 'b' eps=2e-05, momentum=0.5" in model.report
        assert model.frozen == ['0.weight'] and sum('not trained in Gluon' in line for line in model.report) == 1
        like.load_state_dict(model.state_dict())
        np.testing.assert_allclose(like.eval()(torch.tensor(X.asnumpy())).detach(), net(X).asnumpy(), atol=1e-5)
        assert model.freeze(like) is like and [p.requires_grad for p in like.parameters()] == [False, True, True, True]


def test_a_symbol_block_within_a_net(tmp_path):
    net = nn.HybridSequential()
    net.add(symbol_block(tmp_path), nn.Dense(2, in_units=3))
    net[1].initialize()
    facts = go.models.gluon.facts_of(net)
    assert facts.ones == {'0.b_gamma'} and facts.epsilon == {'0.b_gamma': 2e-5} and not facts.unknown


def test_gamma_that_is_trained_is_no_fixed_one(tmp_path):
    model = go.model_to_torch(symbol_block(tmp_path, fix_gamma=False))
    assert model.frozen == [] and (model.weights['b.weight'] == 1.25).all()


def test_blocks_tell_what_they_are_and_what_they_do_not_know(tmp_path):
    class Own(gluon.HybridBlock):
        def __init__(self):
            super().__init__()
            with self.name_scope():
                self.gamma = self.params.get('gamma', shape=(4,), init='ones')

        def hybrid_forward(self, F, x, gamma):
            return x * gamma

    net = nn.HybridSequential()
    net.add(nn.BatchNorm(in_channels=4, scale=False), nn.LayerNorm(in_channels=4, epsilon=1e-3), Own(), nn.Dense(3, in_units=4))
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), 'novograd')
    step(net, trainer)
    go.save_checkpoint(tmp_path / 'run', net=net, trainer=trainer)
    facts = go.read_states(tmp_path / 'run').facts
    assert facts['fix_gamma'] == ['0.gamma'] and facts['epsilon'] == {'0.gamma': 1e-5, '1.gamma': 1e-3}
    assert facts['unknown'] == ['2.gamma']
    for source in (net, tmp_path / 'run'):
        report = go.model_to_torch(source).report
        assert any(line.startswith('unknown') and "'2.gamma'" in line for line in report)
        assert "give the layer of '1' eps=0.001" in report


def test_sources_without_facts_say_unknown(tmp_path):
    net = nn.HybridSequential()
    net.add(nn.BatchNorm(in_channels=4, scale=False), nn.Dense(3, in_units=4))
    net.initialize()
    net.save_parameters(str(tmp_path / 'net.params'))
    arrays = {name: parameter.data().asnumpy() for name, parameter in net._collect_params_with_prefix().items()}
    trainer = gluon.Trainer(net.collect_params(), 'novograd')
    for source in (str(tmp_path / 'net.params'), arrays):
        assert any(line.startswith('unknown') and "'0.gamma'" in line for line in go.model_to_torch(source).report)
        go.save_states(trainer, tmp_path / 'states', net=net)  # which hold them
        report = go.model_to_torch(source, states=go.read_states(tmp_path / 'states')).report
        assert not any('unknown' in line for line in report) and any('fix_gamma' in line for line in report)
    go.save_states(trainer, tmp_path / 'states')  # without the net
    assert go.read_states(tmp_path / 'states').facts is None


def test_what_is_frozen_is_known_in_the_checkpoint_and_said_in_one_line(tmp_path):
    net = nn.HybridSequential()
    for _ in range(40):
        net.add(nn.Dense(4, in_units=4))
    net.add(nn.Dense(2, in_units=4))
    net.initialize()
    for layer in net[:40]:
        layer.collect_params().setattr('grad_req', 'null')
    net[40].weight.grad_req = 'add'
    trainer = gluon.Trainer(net.collect_params(), 'adamw')
    step(net, trainer)
    head = gluon.Trainer(net[40].collect_params(), 'adamw')  # the frozen ones are in no trainer
    step(net, head)
    for given in (trainer, head):
        go.save_checkpoint(tmp_path / 'run', net=net, trainer=given)
        model = go.model_to_torch(tmp_path / 'run')
        assert model.frozen == [f'{k}.{leaf}' for k in range(40) for leaf in ('weight', 'bias')]
        module = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(40)), torch.nn.Linear(4, 2))
        model.freeze(module)
        assert [p.requires_grad for p in module.parameters()] == [False] * 80 + [True] * 2
        states = model.states()
        go.to_torch(states)
        for report in (model.report, states.report):
            assert max(map(len, report)) < 300, report
        assert sum('trained' in line for line in model.report) == 1
    assert {info.name: info.grad_req for info in go.read_states(tmp_path / 'run').parameters} == {
        '40.weight': 'add', '40.bias': 'write'}
    with pytest.raises(ValueError, match="one without '0.bias'"):
        model.freeze(torch.nn.Linear(4, 2))


class Tied(gluon.Block):
    """The decoder's weight is the encoder's."""

    def __init__(self):
        super().__init__()
        with self.name_scope():
            self.emb = nn.Embedding(7, 4)
            self.dec = nn.Dense(7, in_units=4, flatten=False, params=self.emb.params)

    def forward(self, x):
        return self.dec(self.emb(x))


class TiedModule(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.dec = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7)
        self.dec.weight = self.emb.weight


@pytest.mark.parametrize('with_net', [True, False])
def test_either_name_of_a_shared_parameter_is_accepted(tmp_path, with_net):
    net = Tied()
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), 'novograd')
    with autograd.record():
        loss = (net(mx.nd.array([[1, 2]])) ** 2).mean()
    loss.backward()
    trainer.step(1)
    net.save_parameters(str(tmp_path / 'dedup.params'), deduplicate=True)  # under the last of its names
    go.save_checkpoint(tmp_path / 'run', net=net, trainer=trainer)        # under the first
    states = go.read_states(tmp_path / 'run')
    assert states.facts['shared'] == {'dec.weight': 'emb.weight'}
    mean = states.slots['emb.weight']['mean']
    if not with_net:
        states.facts = None  # as in a file of version 1
    for like in (TiedModule(),) + (() if not with_net else (None,)):
        followed = go.model_to_torch(tmp_path / 'dedup.params', like=like, states=states).states()
        name = 'emb.weight' if like is not None else 'dec.weight'
        assert (followed.slots[name]['mean'] == mean).all()
    if with_net:
        assert (go.to_torch(states, params=['dec.weight', 'dec.bias'])['state'][0]['exp_avg'].numpy() == mean).all()
        assert set(states.under_own_names(mx.nd.load(str(tmp_path / 'dedup.params')))) == {'emb.weight', 'dec.bias'}
        names = {'a': 'dec.weight', 'b': 'dec.bias'}
        assert list(go.model_to_torch(tmp_path / 'run', names=names).weights) == ['a', 'b']


def test_inspect_shows_what_is_frozen(tmp_path, capsys):
    from gluon_optim.cli import main
    net = nn.HybridSequential()
    net.add(nn.Dense(4, in_units=4), nn.Dense(2, in_units=4))
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), 'adamw')
    for frozen in (False, True):
        net[0].weight.grad_req = 'null' if frozen else 'write'
        go.save_checkpoint(tmp_path / 'run', net=net, trainer=trainer)
        main(['inspect', str(tmp_path / 'run')])
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        row = next(line for line in lines if line[0] == '0.weight')
        assert ('null' in row) == frozen and any('grad_req' in line for line in lines) == frozen


def test_slots_of_another_shape_follow_an_array_only_where_its_layout_stays():
    """As an optimizer has them that keeps a number for each row and each column."""
    from gluon_optim.states.model import OptimizerStates, ParameterInfo
    weight, rows, columns = np.ones((3, 2, 2, 4), 'float32'), np.arange(3, dtype='float32'), np.arange(4, dtype='float32')
    info = ParameterInfo('0.weight', '0.weight', (3, 2, 2, 4), 'float32')
    states = OptimizerStates('factored', {}, 3, [info], {'0.weight': 3}, {'0.weight': {'rows': rows, 'columns': columns}})
    same = go.model_to_torch({'0.weight': weight}, states=states, names={'conv.weight': '0.weight'}).states()
    assert same.slots['conv.weight']['rows'] is rows
    turned = go.model_to_torch({'0.weight': weight}, states=states, names={
        'conv.weight': {'from': '0.weight', 'transpose': [0, 3, 1, 2]}})
    with pytest.raises(ValueError, match="'rows', 'columns' follows the axes"):
        turned.states()
    lossy = turned.states(allow_lossy=True)
    assert 'conv.weight' not in lossy.slots and lossy.counts['conv.weight'] == 0 and 'lost: ' in lossy.report[-1]


@pytest.mark.parametrize('to', ['torch', 'onnx', 'optax'])
def test_onnx_and_optax_leave_out_what_is_frozen(tmp_path, capsys, to):
    """There an optimizer updates, and decays, all that it is given; in PyTorch it skips what has no gradient."""
    if to == 'onnx':
        pytest.importorskip('onnx')
    net = nn.HybridSequential()
    net.add(nn.Dense(4, in_units=4), nn.BatchNorm(in_channels=4), nn.Dense(2, in_units=4))
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), 'adamw')
    net[0].weight.grad_req = 'null'
    step(net, trainer)
    net[2].bias.grad_req = 'null'  # frozen now, but with a state, which nothing drops
    go.save_states(trainer, tmp_path / 'run', net=net)

    def report(*options):
        command = ['convert', str(tmp_path / 'run'), '--to', to, '-o', str(tmp_path / 'x'), '--force', '--json', *options]
        assert cli.main(command) == 0
        return json.loads(capsys.readouterr().out)

    found = report()
    untrained = ['0.weight'] if to == 'torch' else []
    assert sorted(one['name'] for one in found['parameters']) == sorted(
        ['0.bias', '1.beta', '1.gamma', '2.bias', '2.weight', *untrained])
    said = [line for line in found['report'] if "'0.weight'" in line and 'in this order' not in line]
    assert len(said) == 1 and said[0].startswith("not trained in Gluon: '" if to == 'torch' else 'left out, because Gluon does not')
    (tmp_path / 'names').write_text(json.dumps(['0.weight', '2.weight']))
    assert [one['name'] for one in report('--params', str(tmp_path / 'names'))['parameters']] == ['0.weight', '2.weight']
