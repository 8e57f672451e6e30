"""MXNet's own optimizers and other people's: saved, resumed in another process bit for bit, inspected, refused with reasons."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip('mxnet')

import gluon_optim as go  # noqa: E402
from gluon_optim.mapping.selection import normalize  # noqa: E402
from gluon_optim.mxnet.trainer import export_states, import_states  # noqa: E402
from gluon_optim.states import inspection  # noqa: E402
from gluon_optim.transfer.read import read  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
import native_runs as runs  # noqa: E402

ROOT = Path(runs.__file__).parents[1]
CONFIGS = [{'optimizer': name} for name in {**runs.BUILTINS, **runs.STRANGERS}] + [
    {'optimizer': name, **options} for name in ('adam', 'bertadam', 'nesting')
    for options in ({'scheduler': True}, {'on_kvstore': True}, {'contexts': [0, 1]}, {'contexts': [3]})] + [
    {'optimizer': name, 'half': True} for name in ('adam', 'sgd', 'bertadam')] + [
    {'optimizer': 'remembering', 'scheduler': True}]


def name_of(config):
    return '-'.join([config['optimizer'], *(key + str(value) for key, value in config.items() if key != 'optimizer')])


@pytest.fixture(scope='module')
def resumed(tmp_path_factory):
    """Each run saved after three steps, its next four, and the same four in another process."""
    folder, jobs, wanted = tmp_path_factory.mktemp('native'), [], {}
    for config in CONFIGS:
        path = str(folder / name_of(config))
        net, trainer = runs.make(config)
        runs.train(net, trainer, 3)
        go.save_checkpoint(path, net=net, trainer=trainer, step=3)
        saved = runs.facts(net, trainer)
        runs.train(net, trainer, 4)
        wanted[name_of(config)] = {'loaded': saved, 'end': runs.facts(net, trainer)}
        jobs.append([config, path, 4])
    done = subprocess.run([sys.executable, runs.__file__], input=json.dumps(jobs), capture_output=True, text=True, check=True,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)})
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]
    return folder, wanted, dict(zip(wanted, found))


@pytest.mark.parametrize('config', CONFIGS, ids=name_of)
def test_resumed_in_another_process_bit_for_bit(resumed, config):
    _, wanted, found = resumed
    name = name_of(config)
    assert 'error' not in found[name], found[name].get('error')
    assert found[name] == wanted[name]


@pytest.mark.parametrize('name', [*runs.BUILTINS, *runs.STRANGERS])
def test_their_files_can_be_read_without_them(resumed, name):
    folder = resumed[0]
    contents = read(folder / name)
    states = contents.states
    assert states.optimizer == name and inspection.missing(states) == [] and states.num_update == 3
    assert set(states.counts.values()) == {3} and len(list(inspection.rows(contents))) >= 4
    assert bool(states.trees) == (name in runs.STRANGERS)


def test_slots_are_named_by_their_places(resumed):
    folder = resumed[0]
    assert list(go.read_states(folder / 'bertadam').slots['0.weight']) == ['0', '1']
    assert list(go.read_states(folder / 'bare').slots['0.weight']) == ['0']
    nesting = go.read_states(folder / 'nesting')
    assert {slot: array.shape for slot, array in nesting.slots['0.weight'].items()} == {'0': (3, 1), '1.1.0': (3, 4), '1.2.1': (1,)}
    assert nesting.slots['0.bias'] == {} and nesting.trees['0.bias'] == 'none'
    remembering = go.read_states(folder / 'remembering')
    assert remembering.hypers['schedule'] < 1 and remembering.attributes['betas'] == {'tuple': [{'value': 0.9}, {'value': 0.99}]}
    assert {'sums:0', 'numbers:0', 'scale:0'} < set(remembering.variables)


def test_a_builtin_goes_on_accelerated_and_back(resumed, tmp_path):
    """Its states are those of its drop-in."""
    folder, wanted, _ = resumed
    config = {'optimizer': 'adam'}
    go.accelerate('adam')
    try:
        net, trainer = runs.make(config)
    finally:
        go.restore_builtins()
    assert type(trainer._optimizer).__module__ == 'gluon_optim.mxnet.builtin'
    go.load_checkpoint(folder / 'adam', net=net, trainer=trainer)
    assert runs.facts(net, trainer)['states'] == wanted['adam']['loaded']['states']
    go.save_checkpoint(tmp_path / 'back', net=net, trainer=trainer)
    net, trainer = runs.make(config)
    assert type(trainer._optimizer) is mx.optimizer.Adam
    go.load_checkpoint(tmp_path / 'back', net=net, trainer=trainer)
    runs.train(net, trainer, 4)
    assert runs.facts(net, trainer) == wanted['adam']['end']


def test_looking_at_mxnets_optimizer_leaves_mxnet_as_it_was():
    before = mx.optimizer.Updater.set_states
    net, trainer = runs.make({'optimizer': 'adam'})
    runs.train(net, trainer, 1)
    go.states_digest(trainer, net)
    assert mx.optimizer.Updater.set_states is before and type(trainer._optimizer) is mx.optimizer.Adam


def test_hyperparameters_of_a_stranger():
    net, trainer = runs.make({'optimizer': 'bertadam'})
    runs.train(net, trainer, 1)
    states = export_states(trainer, net)
    for mode, words, beta1 in (('file', "beta1 is 0.5 in the trainer and 0.9 in the file: the file's applies", 0.9),
                               ('current', "beta1 is 0.5 in the trainer and 0.9 in the file: the trainer's applies", 0.5)):
        net, trainer = runs.make({'optimizer': 'bertadam'})
        trainer._optimizer.beta1 = 0.5
        with pytest.warns(UserWarning, match=words):
            import_states(trainer, states, net, hyperparameters=mode)
        assert trainer._optimizer.beta1 == beta1


def spoiled_attribute(trainer):
    trainer._optimizer.callback = print


def spoiled_state(trainer):
    trainer._updaters[0].states[0] = object()


@pytest.mark.parametrize('spoil, words', [
    (spoiled_attribute, "attribute 'callback' of .*BERTAdam cannot be saved: .*Received: builtin_function_or_method"),
    (spoiled_state, r'state that .*BERTAdam keeps for 0\.bias cannot be saved: .*object')])
def test_what_cannot_be_saved_is_named(tmp_path, spoil, words):
    net, trainer = runs.make({'optimizer': 'bertadam'})
    runs.train(net, trainer, 1)
    spoil(trainer)
    with pytest.raises(TypeError, match=words):
        go.save_checkpoint(tmp_path / 'x', net=net, trainer=trainer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('other, words', [('bare', "are of 'bertadam', the trainer runs 'bare'"), ('adam', "runs 'adam'")])
def test_another_optimizer_is_refused(resumed, other, words):
    net, trainer = runs.make({'optimizer': other})
    with pytest.raises(ValueError, match=words):
        go.load_checkpoint(resumed[0] / 'bertadam', net=net, trainer=trainer)


def test_an_optimizer_that_this_mxnet_does_not_have(resumed):
    states = replace(go.read_states(resumed[0] / 'bertadam'), optimizer='mxnet.optimizer.lans.LANS')
    net, trainer = runs.make({'optimizer': 'adam'})
    with pytest.raises(ValueError, match=f"runs 'adam'. MXNet {mx.__version__} does not have it: continue with the MXNet that"):
        import_states(trainer, states, net)


def test_a_state_that_nests_otherwise_is_refused(resumed):
    """The class has changed since."""
    net, trainer = runs.make({'optimizer': 'bertadam'})
    trainer._optimizer.create_state = lambda index, weight: (mx.nd.zeros_like(weight),) * 3
    with pytest.raises(ValueError, match='the state of 0.bias must be .*tuple.*, in the file it is'):
        go.load_checkpoint(resumed[0] / 'bertadam', net=net, trainer=trainer)
    assert all(parameter._data is None for parameter in net.collect_params().values() if parameter.name.endswith('weight'))


@pytest.mark.parametrize('name', ['bertadam', 'bare', 'nesting', 'lamb2', *(name for name in runs.BUILTINS if name != 'sgld')])
def test_mxnets_own_file_of_a_stranger(tmp_path, name):
    config = {'optimizer': name}
    net, trainer = runs.make(config)
    runs.train(net, trainer, 3)
    trainer.save_states(str(tmp_path / 'mxnet.states'))
    net.save_parameters(str(tmp_path / 'net.params'))
    other, resumed = runs.make(config)
    other.load_parameters(str(tmp_path / 'net.params'))
    go.load_states(resumed, tmp_path / 'mxnet.states', net=other)
    assert go.states_digest(resumed, other) == go.states_digest(trainer, net)
    runs.train(net, trainer, 2)
    runs.train(other, resumed, 2)
    assert runs.facts(other, resumed) == runs.facts(net, trainer)


def test_counts_go_on_for_a_parameter_that_was_not_trained_from_the_start(tmp_path):
    net, trainer = runs.make({'optimizer': 'adam'})
    runs.train(net, trainer, 1)
    net[0].weight.grad_req = 'null'
    runs.train(net, trainer, 2)
    go.save_states(trainer, tmp_path / 's', net=net)
    counts = go.read_states(tmp_path / 's').counts
    assert counts['0.weight'] == 1 and counts['0.bias'] == 3
    other, resumed = runs.make({'optimizer': 'adam'})
    go.load_states(resumed, tmp_path / 's', net=other)
    assert resumed._optimizer._index_update_count == trainer._optimizer._index_update_count
    np.testing.assert_equal(go.states_digest(resumed, other), go.states_digest(trainer, net))


# Conversion

def test_conversion_needs_a_rule_and_says_so(resumed, tmp_path):
    torch = pytest.importorskip('torch')
    states = go.read_states(resumed[0] / 'bertadam')
    with pytest.raises(ValueError, match=r"Received: 'bertadam'.*states\.as_rule\('adamw'\)"):
        go.to_torch(states)
    taken = states.as_rule('adamw')
    assert (taken.hypers['epsilon'], taken.hypers['learning_rate']) == (1e-6, 0.05)
    assert list(taken.slots['0.weight']) == ['mean', 'var']
    assert np.shares_memory(taken.slots['0.weight']['var'], states.slots['0.weight']['1']) and not taken.trees
    assert taken.report[0] == "bertadam is taken for adamw, as you say: its arrays are 'mean', 'var', in this order"
    optimizer = go.torch.create('adamw', [torch.nn.Parameter(torch.zeros(info.shape)) for info in taken.parameters])
    optimizer.load_state_dict(go.to_torch(taken))
    assert states.as_rule('adamw', epsilon=0.5).hypers['epsilon'] == 0.5
    half = go.read_states(resumed[0] / 'bertadam-halfTrue').as_rule('adamw')
    assert half.master['0.weight'].dtype == np.float32 and list(half.slots['0.weight']) == ['mean', 'var']
    with pytest.raises(ValueError, match='as many arrays as the rule has slots, 0: .*Received: 2'):
        states.as_rule('sgd_torch')
    with pytest.raises(ValueError, match="must be of an optimizer without a rule here. Received: those of 'adam'"):
        go.read_states(resumed[0] / 'adam').as_rule('adamw')
    with pytest.raises(ValueError, match="'mean' of '0.weight' must have the shape"):
        states.slots['0.weight']['0'] = np.zeros(3, 'float32')
        states.as_rule('adamw')


def test_conversion_on_the_command_line(resumed, tmp_path):
    pytest.importorskip('torch')

    def convert(*options):
        return subprocess.run([sys.executable, '-m', 'gluon_optim.cli', 'convert',
                               str(resumed[0] / 'bertadam'), '--to', 'torch', '-o', str(tmp_path / 'x.pt'), *options],
                              capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)}, check=False)

    refused = convert()
    assert refused.returncode == 1 and 'say which: --as adamw' in refused.stderr and not (tmp_path / 'x.pt').exists()
    done = convert('--as', 'adamw')
    assert done.returncode == 0 and 'bertadam is taken for adamw' in done.stdout, done.stderr


def test_somebody_elses_class_of_a_known_name_is_not_taken_for_it(tmp_path):
    class AdamW(runs.BERTAdam):
        pass

    class LAMB(runs.Bare):
        pass

    for cls in (AdamW, LAMB):
        cls.__module__, cls.__qualname__ = 'theirs', cls.__name__
        net, _ = runs.make({'optimizer': 'adam'})
        trainer = mx.gluon.Trainer(net.collect_params(), cls(learning_rate=0.05))
        runs.train(net, trainer, 2)
        path = f'theirs.{cls.__name__}'
        go.save_states(trainer, tmp_path / 'states', net=net)
        states = go.read_states(tmp_path / 'states')
        assert states.optimizer == path and inspection.missing(states) == []
        with pytest.raises(ValueError, match=f"Received: '{path}'"):
            normalize(states)
        sys.modules['theirs'] = type(sys)('theirs')
        setattr(sys.modules['theirs'], cls.__name__, cls)
        try:
            trainer.save_states(str(tmp_path / 'mxnet.states'))
        finally:
            del sys.modules['theirs']
        old = go.read_states(tmp_path / 'mxnet.states', [p.name for p in trainer._params], allow=[path])
        assert old.optimizer == path and old.trees.keys() == old.slots.keys()
        go.load_states(trainer, tmp_path / 'mxnet.states', net=net)


def test_attributes_by_index_go_to_no_other_parameter(tmp_path):
    """`sums` of this optimizer is kept by the index in the trainer, and the order may be another one."""
    net, trainer = runs.make({'optimizer': 'remembering'})
    runs.train(net, trainer, 2)
    go.save_checkpoint(tmp_path / 'run', net=net, trainer=trainer)
    other, _ = runs.make({'optimizer': 'remembering'})
    turned = mx.gluon.Trainer(list(other.collect_params().values())[::-1], 'remembering')
    with pytest.raises(ValueError, match="keeps 'sums' by their index.*another place for '1.bias'"):
        go.load_checkpoint(tmp_path / 'run', net=other, trainer=turned)
    net, trainer = runs.make({'optimizer': 'bertadam'})
    runs.train(net, trainer, 2)
    go.save_checkpoint(tmp_path / 'run', net=net, trainer=trainer)
    turned = mx.gluon.Trainer(list(other.collect_params().values())[::-1], 'bertadam')
    with pytest.warns(UserWarning, match='learning_rate is'):
        go.load_checkpoint(tmp_path / 'run', net=other, trainer=turned)  # that of others goes by name
    assert go.states_digest(turned, other) == go.states_digest(trainer, net)
