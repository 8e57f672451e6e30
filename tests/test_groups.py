"""Parameter groups: which parameters a rule matches, what they get, and that it is what the optimizer then uses."""
import itertools
import math
import pickle
import re
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip('mxnet')

from mxnet import autograd, gluon  # noqa: E402
from mxnet.gluon import nn, rnn  # noqa: E402

import gluon_optim as go  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
import checkpoint_runs as runs  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


class Net(gluon.HybridBlock):
    """One of each kind of layer, and parameters of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.position = self.params.get('position', shape=(5, 8))
            self.scale = self.params.get('scale', shape=(1,))
            self.embedding = nn.Embedding(20, 8)
            self.lstm = rnn.LSTM(6, input_size=8, bidirectional=True)
            self.cell = rnn.GRUCell(6, input_size=8)
            self.body = nn.HybridSequential()
            self.body.add(nn.Conv2D(8, 3, in_channels=4), nn.Conv2DTranspose(6, 2, in_channels=8), nn.PReLU(),
                          *(norm(in_channels=8) for norm in (nn.BatchNorm, nn.LayerNorm, nn.InstanceNorm)),
                          nn.GroupNorm(num_groups=2))
            self.output = nn.Dense(20, in_units=8, params=self.embedding.params)  # tied
            self.head = nn.Dense(3, in_units=8)


KINDS = {
    'bias': ['lstm._unfused.0.l_cell.i2h_bias', 'lstm._unfused.0.l_cell.h2h_bias', 'lstm._unfused.0.r_cell.i2h_bias',
             'lstm._unfused.0.r_cell.h2h_bias', 'cell.i2h_bias', 'cell.h2h_bias', 'body.0.bias', 'body.1.bias', 'output.bias',
             'head.bias'],
    'norm': [f'body.{k}.{word}' for k in (3, 4, 5, 6) for word in ('gamma', 'beta')],
    'embedding': ['embedding.weight'],
    'matrix': ['position', 'lstm._unfused.0.l_cell.i2h_weight', 'lstm._unfused.0.l_cell.h2h_weight',
               'lstm._unfused.0.r_cell.i2h_weight', 'lstm._unfused.0.r_cell.h2h_weight', 'cell.i2h_weight', 'cell.h2h_weight',
               'body.0.weight', 'body.1.weight', 'head.weight'],
}
NO_KIND = ['scale', 'body.2.alpha']
ALL = [*NO_KIND, *itertools.chain(*KINDS.values())]


def sequential(**shapes):
    net = nn.HybridSequential()
    net.add(nn.Dense(8, in_units=4), nn.BatchNorm(in_channels=8), nn.Dense(2, in_units=8))
    net.initialize()
    return net


def multipliers(net):
    return {name: (p.lr_mult, p.wd_mult) for name, p in net._collect_params_with_prefix().items()
            if not name.endswith(('running_mean', 'running_var'))}


# What is matched

@pytest.mark.parametrize('kind', KINDS)
def test_kinds(kind):
    net = Net()
    found = go.param_groups(net, [(kind, {'lr_mult': 2})])
    assert [name for group in found if group.rules for name in group.names] == KINDS[kind]
    names = sorted(name for group in found for name in group.names)
    assert names == sorted(ALL)
    assert {name for name, (lr_mult, _) in multipliers(net).items() if lr_mult == 2} - {'output.weight'} == set(KINDS[kind])


@pytest.mark.parametrize('pattern, names', [
    ('*', ALL), ('head.*', ['head.weight', 'head.bias']), ('body.[01].bias', ['body.0.bias', 'body.1.bias']),
    ('output.weight', ['embedding.weight']),  # by another of its names
    ('*gru0_?2h_bias', ['cell.i2h_bias', 'cell.h2h_bias']), ('scale', ['scale'])])
def test_patterns(pattern, names):
    with mx.name.NameManager():
        net = Net()
    found = go.param_groups(net, [(pattern, {'wd_mult': 0})])
    assert sorted(name for group in found if group.wd_mult == 0 for name in group.names) == sorted(names)


def test_a_parameter_that_is_in_no_attribute():
    class Block(gluon.HybridBlock):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            with self.name_scope():
                self.params.get('table', shape=(2, 3))

    net = Block(prefix='net_')
    found = go.param_groups(net, [('matrix', {'lr_mult': 0.5})])  # the trainer has it under its full name
    assert found.groups[0].names == ('net_table',) and net.collect_params()['net_table'].lr_mult == 0.5


def test_of_rules_for_the_same_the_last_holds():
    net = sequential()
    net[0].bias.lr_mult, net[2].bias.lr_mult = 7, 7
    found = go.param_groups(net, [('*', {'lr_mult': 0.5, 'wd_mult': 2}), *go.groups.NO_DECAY, ('2.*', {'lr_mult': 3})])
    assert multipliers(net) == {'0.weight': (0.5, 2), '0.bias': (0.5, 0), '1.gamma': (0.5, 0), '1.beta': (0.5, 0),
                                '2.weight': (3, 2), '2.bias': (3, 0)}
    assert {name: group.rules for group in found for name in group.names} == {
        '0.weight': ('*',), '0.bias': ('*', 'bias'), '1.gamma': ('*', 'norm'), '1.beta': ('*', 'norm'),
        '2.weight': ('*', '2.*'), '2.bias': ('*', 'bias', '2.*')}
    go.param_groups(net, [('bias', {'wd_mult': 1})])  # what no rule sets stays
    assert multipliers(net)['2.bias'] == (3, 1)
    with pytest.warns(UserWarning, match="The rule 'bias' has no effect"):
        go.param_groups(net, [('bias', {'wd_mult': 0}), ('*', {'wd_mult': 1, 'lr_mult': 1})])


def test_a_function_gets_name_and_parameter():
    net = sequential()
    seen = []

    def by_size(name, parameter):
        seen.append((name, parameter.shape))
        return {'lr_mult': np.float32(1 / parameter.shape[0])}

    go.param_groups(net, [('matrix', by_size)])
    assert seen == [('0.weight', (8, 4)), ('2.weight', (2, 8))]
    assert net[0].weight.lr_mult == 0.125 and type(net[0].weight.lr_mult) is float


def test_a_net_from_a_symbol(tmp_path):
    """Its names and operators are known, its layers are not."""
    net = nn.HybridSequential()
    net.add(nn.Embedding(7, 4, prefix='words_'), nn.Conv1D(4, 3, in_channels=5, prefix='conv_'), nn.BatchNorm(prefix='norm_'),
            nn.Conv1DTranspose(6, 2, in_channels=4, groups=2, prefix='up_'), nn.Dense(2, prefix='head_'))
    net.initialize()
    net.hybridize()
    net(mx.nd.ones((2, 5)))
    net.export(str(tmp_path / 'net'))
    net = gluon.SymbolBlock(mx.sym.load(str(tmp_path / 'net-symbol.json')), mx.sym.var('data', dtype='float32'))
    with pytest.raises(ValueError, match='Received: conv_weight, a parameter of a SymbolBlock. Load its parameters first'):
        go.param_groups(net, [])
    net.load_parameters(str(tmp_path / 'net-0000.params'), allow_missing=True, ignore_extra=True)
    go.param_groups(net, [('embedding', {'lr_mult': 5}), ('matrix', go.groups.fan_in(net)), *go.groups.NO_DECAY])
    inputs = net.collect_params()['head_weight'].data().shape[1]
    assert {name: (p.lr_mult, p.wd_mult) for name, p in net.collect_params().items() if 'running' not in name} == {
        'words_weight': (5, 1), 'conv_weight': (1 / math.sqrt(5 * 3), 1), 'conv_bias': (1, 0), 'norm_gamma': (1, 0),
        'norm_beta': (1, 0), 'up_weight': (1 / math.sqrt(4 / 2 * 2), 1), 'up_bias': (1, 0),
        'head_weight': (1 / math.sqrt(inputs), 1), 'head_bias': (1, 0)}
    go.param_groups(net, [('*', go.groups.layer_decay(net, 0.5))])
    assert {name: p.lr_mult for name, p in net.collect_params().items() if 'running' not in name} == {
        'words_weight': 0.125, 'conv_weight': 0.25, 'conv_bias': 0.25, 'norm_gamma': 0.25, 'norm_beta': 0.25, 'up_weight': 0.5,
        'up_bias': 0.5, 'head_weight': 1, 'head_bias': 1}


# Recipes

def test_rates_by_fan_in():
    """LeCun: 1/sqrt(n); the page of OpenSeq2Seq: 1/(sqrt(c) k) for c input channels and a k x k kernel."""
    net = nn.HybridSequential()
    net.add(nn.Dense(3, in_units=25), nn.Conv2D(8, 5, in_channels=4), nn.Conv2D(8, 5, in_channels=4, groups=2),
            nn.Conv1D(2, 3, in_channels=9), nn.Conv2DTranspose(6, 5, in_channels=9),
            nn.Conv2DTranspose(6, 5, in_channels=8, groups=2), nn.Conv2D(8, (2, 8), in_channels=4, layout='NHWC'))
    go.param_groups(net, [('matrix', go.groups.fan_in(net))])
    wanted = [1 / 5, 1 / (2 * 5), 1 / (math.sqrt(2) * 5), 1 / (3 * math.sqrt(3)), 1 / (3 * 5), 1 / (2 * 5), 1 / 8]
    np.testing.assert_allclose([layer.weight.lr_mult for layer in net], wanted, rtol=1e-15)
    assert all(layer.bias.lr_mult == 1 for layer in net)


def test_fan_in_of_shapes_that_are_not_known_yet():
    net = nn.Dense(3)
    with pytest.raises(ValueError, match=r'Received: weight with shape \(3, 0\). Run one forward pass first'):
        go.param_groups(net, [('matrix', go.groups.fan_in(net))])
    assert '?' in repr(go.param_groups(net, [('matrix', {'lr_mult': 0.5})]))
    net.initialize()
    net(mx.nd.ones((2, 4)))
    assert net.weight.lr_mult == 0.5
    go.param_groups(net, [('matrix', go.groups.fan_in(net))])
    assert net.weight.lr_mult == 0.5  # 1 / sqrt(4)


def test_rates_by_layer():
    net = Net()
    go.param_groups(net, [('*', go.groups.layer_decay(net, 0.5))])
    layers = [['position', 'scale'], ['embedding.weight'], ['lstm._unfused.0.l_cell.i2h_weight', 'lstm._unfused.0.r_cell.h2h_bias'],
              ['cell.i2h_weight'], ['body.0.weight', 'body.0.bias'], ['body.1.bias', 'body.2.alpha', 'body.6.gamma', 'output.bias'],
              ['head.weight', 'head.bias']]
    found = multipliers(net)
    for k, names in enumerate(layers):
        assert {found[name][0] for name in names} == {0.5 ** (len(layers) - 1 - k)}, names


def test_rates_by_layers_that_are_given():
    net = Net()
    go.param_groups(net, [('*', go.groups.layer_decay(net, 0.1, ['body.*', 'head.weight', '*']))])
    found = {name: lr_mult for name, (lr_mult, _) in multipliers(net).items()}
    assert found['body.0.weight'] == pytest.approx(0.01) and found['head.weight'] == 0.1 and found['head.bias'] == 1
    with pytest.raises(ValueError, match="must have a pattern for each parameter. Received: none that matches 'position', 'scale'"):
        go.groups.layer_decay(net, 0.1, ['embedding.*', 'body.*'])
    with pytest.raises(ValueError, match="must match a parameter. Received: 'nothing'"):
        go.groups.layer_decay(net, 0.1, ['nothing', '*'])


@pytest.mark.parametrize('decay', [0, -0.5, 1.5, float('nan')])
def test_decays_out_of_range(decay):
    with pytest.raises(ValueError, match=r'`decay` must be in \(0, 1\]'):
        go.groups.layer_decay(sequential(), decay)


# What is refused

@pytest.mark.parametrize('bias, norm, rules', [(True, False, ['', 'bias']), (False, True, ['', 'norm']), (False, False, ['']),
                                               (True, True, ['', 'bias', 'norm'])])
@pytest.mark.filterwarnings('error')
def test_no_decay_is_for_any_net(bias, norm, rules):
    """With or without biases and normalizations; what users write themselves must match."""
    net = nn.HybridSequential()
    net.add(nn.Dense(2, in_units=2, use_bias=bias), *([nn.LayerNorm(in_channels=2)] if norm else []))
    found = go.param_groups(net, go.groups.NO_DECAY)
    assert [','.join(group.rules) for group in found] == rules
    assert [group.wd_mult for group in found] == [1.0] + [0.0] * (len(rules) - 1)
    if len(rules) < 3:
        with pytest.raises(ValueError, match='Each rule must match'):
            go.param_groups(net, [(kind, dict(values)) for kind, values in go.groups.NO_DECAY])


@pytest.mark.parametrize('rules, error, words', [
    ([('bias', {'wd_mult': 0}), ('head.*', {'lr_mult': 2})], ValueError, "Received: 'head.*', which match none. Kinds: 'bias'"),
    ([('embedding', {'wd_mult': 0})], ValueError, "Each rule must match a parameter that is trained. Received: 'embedding'"),
    ([('biases', {'wd_mult': 0})], ValueError, "Received: 'biases', which match none. Kinds: .*; names: '0.weight', '0.bias'"),
    ([('*running*', {'wd_mult': 0})], ValueError, 'match a parameter that is trained'),
    ([('', {'wd_mult': 0})], ValueError, 'pattern of a rule must not be empty'),
    ([('bias', {'wd_mul': 0})], TypeError, "Unknown multiplier of the rule 'bias' 'wd_mul'. Did you mean 'wd_mult'"),
    ([('bias', {'wd': 0})], TypeError, "Unknown multiplier of the rule 'bias' 'wd'"),
    ([('bias', {})], ValueError, "The rule 'bias' must set a multiplier"),
    ([('bias', {'wd_mult': -1})], ValueError, r"In the rule 'bias': `wd_mult` must be in \[0, inf\). Received: wd_mult=-1"),
    ([('bias', {'wd_mult': float('nan')})], ValueError, r'must be in \[0, inf\)'),
    ([('bias', {'lr_mult': float('inf')})], ValueError, r'must be in \[0, inf\)'),
    ([('bias', {'lr_mult': '1'})], (TypeError, ValueError), "In the rule 'bias': `lr_mult` must be"),
    ([('bias', {'lr_mult': True})], (TypeError, ValueError), "In the rule 'bias': `lr_mult` must be"),
    ([('bias', lambda name, parameter: 2)], TypeError, "function of the rule 'bias' must return a dictionary.*for 0.bias: 2"),
    ([('bias', lambda name, parameter: {'lr_mult': -1})], ValueError, "In the rule 'bias' for 0.bias: `lr_mult` must be"),
    ([('bias', 0)], TypeError, 'A rule must be a kind or pattern, and a dictionary'), ([('bias',)], TypeError, 'A rule must be'),
    ([(3, {})], TypeError, 'A rule must be'),
    ({'bias': {'wd_mult': 0}}, TypeError, '`rules` must be a list of rules. Received: dict'),
    ([('bias', go.groups.fan_in(sequential()))], ValueError, 'another net, without 0.bias'),
])
def test_bad_rules_set_nothing(rules, error, words):
    net = sequential()
    given = [('matrix', {'lr_mult': 0.25}), *rules] if isinstance(rules, list) else rules
    with pytest.raises(error, match=words):
        go.param_groups(net, given)
    assert set(multipliers(net).values()) == {(1, 1)}


def test_fan_in_of_other_kinds():
    net = sequential()
    with pytest.raises(ValueError, match="`fan_in` is for matrices. Received: 0.bias, of kind 'bias'"):
        go.param_groups(net, [('*', {'lr_mult': 1}), ('0.*', go.groups.fan_in(net))])


def test_only_of_a_net():
    with pytest.raises(TypeError, match='`net` must be a gluon.Block. Received: ParameterDict'):
        go.param_groups(sequential().collect_params(), [])


# What is shown

def test_the_table():
    net = sequential()
    found = go.param_groups(net, [('*', {'lr_mult': 1 / 3}), *go.groups.NO_DECAY])
    assert repr(found) == """\
<ParamGroups: 6 parameters in 3 groups>
  lr_mult  wd_mult  parameters  values  rules    names
   0.3333        1           2      48  *        0.weight, 2.weight
   0.3333        0           2      10  *, bias  0.bias, 2.bias
   0.3333        0           2      16  *, norm  1.gamma, 1.beta"""
    assert found._repr_html_().count('<tr>') == 4 and '<th>lr_mult</th>' in found._repr_html_()
    assert len(found) == 3 and found.groups[1] == (1 / 3, 0.0, ('*', 'bias'), ('0.bias', '2.bias'), 10)
    assert repr(go.param_groups(net, [])).splitlines()[2].split() == ['0.3333', '1', '2', '48', '-', '0.weight,', '2.weight']


# What they do

GROUPS = [('*', {'lr_mult': 0.5}), *go.groups.NO_DECAY, ('2.*', {'lr_mult': 2})]


def stepped(net, trainer, steps=3):
    for step in range(steps):
        x = mx.nd.array(np.random.RandomState(step).randn(4, 4))
        with autograd.record():
            losses = [(net(part) ** 2).sum() for part in gluon.utils.split_and_load(x, trainer._contexts)]
        autograd.backward(losses)
        trainer.step(4)
    return {name: p.data(trainer._contexts[0]).asnumpy() for name, p in net._collect_params_with_prefix().items()}


def start(contexts=(0,), **options):
    mx.random.seed(3)
    with mx.name.NameManager():
        net = nn.HybridSequential()
        net.add(nn.Dense(8, in_units=4), nn.LayerNorm(in_channels=8), nn.Dense(2, in_units=8))
    net.initialize(mx.init.Normal(0.5), ctx=[mx.cpu(k) for k in contexts])
    options = {'optimizer': 'sgd_torch', 'optimizer_params': {'learning_rate': 0.05, 'wd': 0.1}, **options}
    return net, lambda: gluon.Trainer(net.collect_params(), **options)


@pytest.mark.parametrize('options', [
    {}, {'contexts': (0, 1), 'update_on_kvstore': False}, {'contexts': (0, 1), 'update_on_kvstore': True},
    {'optimizer': 'sgd', 'contexts': (0, 1), 'update_on_kvstore': True}, {'optimizer': 'sgd'}], ids=str)
@pytest.mark.parametrize('when', ['before', 'after', 'later'])
def test_they_reach_the_optimizer_whenever_they_are_set(options, when):
    """Before its Trainer is made, after that, and after steps. 'sgd' is MXNet's own."""
    net, trainer_of = start(**options)
    if when == 'before':
        go.param_groups(net, GROUPS)
    trainer = trainer_of()
    if when == 'later':
        stepped(net, trainer, 2)
    go.param_groups(net, GROUPS)
    before = {name: p.data(trainer._contexts[0]).asnumpy() for name, p in net._collect_params_with_prefix().items()}
    x = mx.nd.array(np.random.RandomState(0).randn(4, 4))
    with autograd.record():
        losses = [(net(part) ** 2).sum() for part in gluon.utils.split_and_load(x, trainer._contexts)]
    autograd.backward(losses)
    gradients = {name: sum(g.asnumpy() for g in p.list_grad()) / 4 for name, p in net._collect_params_with_prefix().items()}
    trainer.step(4)
    for name, p in net._collect_params_with_prefix().items():
        lr_mult, wd_mult = (2 if name.startswith('2') else 0.5), (1 if name.endswith('weight') else 0)
        wanted = before[name] - 0.05 * lr_mult * (gradients[name] + 0.1 * wd_mult * before[name])
        np.testing.assert_allclose(p.data(trainer._contexts[0]).asnumpy(), wanted, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize('grad_req', ['null', 'add'])
def test_frozen_and_accumulating_parameters(grad_req):
    net, trainer_of = start()
    net[0].weight.grad_req = grad_req
    found = go.param_groups(net, GROUPS)
    assert '0.weight' in found.groups[0].names
    before = net[0].weight.data().asnumpy()
    after = stepped(net, trainer_of(), 1)['0.weight']
    assert (before == after).all() == (grad_req == 'null')


@pytest.mark.parametrize('optimizer, options, refused', [
    ('sgd', {'kvstore': 'dist_sync'}, 'Use one of gluon_optim, or create the trainer with update_on_kvstore=False'),
    ('sgd', {'kvstore': 'dist_async'}, 'sends its own optimizers without multipliers'),
    ('sgd', {'kvstore': 'dist_sync', 'update_on_kvstore': False}, ''), ('sgd', {'kvstore': None}, ''),
    ('sgd_torch', {'kvstore': 'dist_sync'}, '')], ids=str)
def test_on_parameter_servers(optimizer, options, refused):
    """tests/test_servers.py trains there with multipliers."""
    net, trainer_of = start(optimizer=optimizer, **options)
    trainer_of()
    if refused:
        with pytest.raises(ValueError, match=refused):
            go.param_groups(net, GROUPS)
        assert set(multipliers(net).values()) == {(1, 1)}
        assert len(go.param_groups(net, [])) == 1  # only shows them
    else:
        go.param_groups(net, GROUPS)


@pytest.mark.parametrize('optimizer, refused', [('sgd', True), ('sgd_torch', False)])
def test_servers_that_have_their_optimizer(optimizer, refused):
    """They get later changes of one of ours: tests/server_runs.py makes some."""
    net, trainer_of = start(contexts=(0, 1), optimizer=optimizer, update_on_kvstore=True)
    trainer = trainer_of()
    stepped(net, trainer, 1)
    trainer._distributed = True  # as `_init_kvstore` finds of a store with servers
    if refused:
        with pytest.raises(ValueError, match='sends its own optimizers without multipliers. Use one of gluon_optim, or create'):
            go.param_groups(net, GROUPS)
    trainer._distributed = not refused
    go.param_groups(net, GROUPS)


def test_a_pickled_optimizer_has_the_multipliers():
    """It has no parameters, and MXNet then looks into its tables."""
    net, trainer_of = start()
    go.param_groups(net, GROUPS)
    optimizer = trainer_of().optimizer
    again = pickle.loads(pickle.dumps(optimizer))
    assert again.param_dict == {}
    indices = list(range(6))
    assert again._get_lrs(indices) == optimizer._get_lrs(indices) and again._get_wds(indices) == optimizer._get_wds(indices)
    assert len(set(again._get_lrs(indices))) == 2
    again.param_dict = optimizer.param_dict
    go.param_groups(net, [('*', {'lr_mult': 1, 'wd_mult': 1})])
    again = pickle.loads(pickle.dumps(again))
    assert again.lr_mult == again.wd_mult == {}


# In files

def saved(path, rules=GROUPS):
    net, trainer_of = start()
    if rules:
        go.param_groups(net, rules)
    trainer = trainer_of()
    stepped(net, trainer)
    go.save_checkpoint(path, net=net, trainer=trainer)
    return net, trainer


def test_a_run_resumes_with_its_groups(tmp_path):
    net, trainer = saved(tmp_path / 'run')
    wanted = stepped(net, trainer)
    for rules in (GROUPS, None):  # also where the script has forgotten them
        again, trainer_of = start()
        if rules:
            go.param_groups(again, rules)
        trainer = trainer_of()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            go.load_checkpoint(tmp_path / 'run', net=again, trainer=trainer)
        assert [str(warning.message) for warning in said] == ([] if rules else [
            "lr_mult of '0.bias', '0.weight', '1.beta', '1.gamma' is 1.0 in the trainer and 0.5 in the file: the file's applies.",
            "wd_mult of '0.bias', '2.bias', '1.beta', '1.gamma' is 1.0 in the trainer and 0.0 in the file: the file's applies.",
            "lr_mult of '2.bias', '2.weight' is 1.0 in the trainer and 2.0 in the file: the file's applies."])
        assert multipliers(again) == multipliers(net)
        after = stepped(again, trainer)
        assert all((after[name] == wanted[name]).all() for name in wanted)


def test_other_groups_for_the_rest_of_a_run(tmp_path):
    saved(tmp_path / 'run', None)
    net, trainer_of = start()
    go.param_groups(net, GROUPS)
    mine = multipliers(net)
    with pytest.warns(UserWarning, match="the trainer's applies"):
        go.load_checkpoint(tmp_path / 'run', net=net, trainer=trainer_of(), hyperparameters='current')
    assert multipliers(net) == mine
    with pytest.warns(UserWarning, match="the file's applies"):
        go.load_checkpoint(tmp_path / 'run', net=net, trainer=net[0].weight._trainer)
    assert set(multipliers(net).values()) == {(1, 1)}


def test_a_load_that_fails_sets_no_multiplier(tmp_path, monkeypatch):
    saved(tmp_path / 'run')
    net, trainer_of = start()
    trainer = trainer_of()
    monkeypatch.setattr('gluon_optim.mxnet.trainer._set_counts', lambda *arguments: 1 / 0)
    with pytest.warns(UserWarning, match='_mult of '), pytest.raises(ZeroDivisionError):
        go.load_checkpoint(tmp_path / 'run', net=net, trainer=trainer)
    assert set(multipliers(net).values()) == {(1, 1)}
    go.load_checkpoint(tmp_path / 'run', net=net)  # without a trainer nothing trains
    assert set(multipliers(net).values()) == {(1, 1)}


@pytest.mark.parametrize('optimizer', ['sgd', 'sgd_torch'])
def test_multipliers_in_a_file_of_mxnet_do_not_apply(tmp_path, optimizer):
    """MXNet saves none of parameters, and its own load leaves them alone. Nothing is said."""
    net, trainer_of = start(optimizer=optimizer)
    go.param_groups(net, GROUPS)
    trainer = trainer_of()
    stepped(net, trainer)
    mine = multipliers(net)
    trainer.save_states(str(tmp_path / 'run.states'))
    go.param_groups(net, [('*', {'lr_mult': 3, 'wd_mult': 4})])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        go.load_states(trainer, tmp_path / 'run.states')
    assert set(multipliers(net).values()) == {(3, 4)}
    states = go.read_states(tmp_path / 'run.states', params=[p.name for p in trainer._params])
    assert [info.lr_mult for info in states.parameters] == (
        [mine[name][0] for name in ('0.bias', '0.weight', '2.bias', '2.weight', '1.beta', '1.gamma')] if optimizer == 'sgd_torch'
        else [1] * 6)


def test_several_contexts_and_half_precision(tmp_path):
    config = {'half': True, 'contexts': [0, 1], 'arguments': {'multi_precision': True, 'wd': 0.01}}
    net, trainer = runs.make(config)
    go.param_groups(net, [('*', go.groups.layer_decay(net, 0.5)), *go.groups.NO_DECAY])
    runs.train(net, trainer, 2)
    go.save_checkpoint(tmp_path / 'run', net=net, trainer=trainer)
    runs.train(net, trainer, 2)
    wanted = runs.facts(net, trainer)
    again, its_trainer = runs.make(config, seed=9)
    with pytest.warns(UserWarning, match="the file's applies"):
        go.load_checkpoint(tmp_path / 'run', net=again, trainer=its_trainer)
    runs.train(again, its_trainer, 2)
    assert runs.facts(again, its_trainer) == wanted


def test_they_become_param_groups_of_pytorch(tmp_path):
    torch = pytest.importorskip('torch')
    saved(tmp_path / 'run')
    states = go.read_checkpoint(tmp_path / 'run')[0]
    for target in ('mirror', 'torch'):
        state_dict = go.to_torch(states, target=target)
        names = states.names
        rates = {names[k]: (group['lr'], group.get('wd', group.get('weight_decay'))) for group in state_dict['param_groups']
                 for k in group['params']}
        assert rates == {name: (pytest.approx(0.05 * (2 if name.startswith('2') else 0.5)),
                                pytest.approx(0.1 if name.endswith('weight') else 0)) for name in names}
    params = [torch.nn.Parameter(torch.zeros(info.shape)) for info in states.parameters]
    optimizer = torch.optim.SGD(go.torch.param_groups(state_dict, params))
    optimizer.load_state_dict(state_dict)
    assert [group['lr'] for group in optimizer.param_groups] == [group['lr'] for group in state_dict['param_groups']]


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / 'docs/GROUPS.md').read_text(encoding='utf-8')
    names = {}
    for block in re.findall('```python\n(.*?)```', text, re.DOTALL):
        exec(compile(block, 'docs/GROUPS.md', 'exec'), names)  # noqa: S102
    shown = re.search(r'\n\n((?:    .*\n)+)', text).group(1)
    assert capsys.readouterr().out == textwrap.dedent(shown)
