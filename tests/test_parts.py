"""Checkpoints of several nets and trainers, as in GANs: one file, all restored or none."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

mx = pytest.importorskip('mxnet')

import gluon_optim as go  # noqa: E402
from gluon_optim.cli import main  # noqa: E402
from gluon_optim.states import container  # noqa: E402
from gluon_optim.states.errors import StateFileError  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
import gan_runs as gan  # noqa: E402
from commands import refused  # noqa: E402
from test_checkpoint import forged  # noqa: E402
from test_failing_loads import COPIES, FailAt, OutOfMemory, generators, snapshot  # noqa: E402

ROOT = Path(container.__file__).parents[2]
ENVIRONMENT = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT / 'tests')])}
LAYOUTS = [{}, {'contexts': [0, 1], 'update_on_kvstore': False}, {'contexts': [0, 1], 'update_on_kvstore': True}]


def trained(steps=4, **layout):
    nets, trainers = gan.make(**layout)
    gan.train(nets, trainers, steps)
    return nets, trainers


@pytest.fixture
def saved(tmp_path):
    """The path of a checkpoint, and what is in it."""
    nets, trainers = trained()
    path = str(tmp_path / 'gan.safetensors')
    go.save_checkpoint(path, net=nets, trainer=trainers, step=4, extra={'fold': 1})
    return path, nets, trainers


# Saved, resumed

def test_a_new_process_continues_bit_for_bit(tmp_path):
    jobs, wanted = [], []
    for k, layout in enumerate(LAYOUTS):
        nets, trainers = trained(**layout)
        path = str(tmp_path / f'{k}.safetensors')
        go.save_checkpoint(path, net=nets, trainer=trainers, step=4)
        loaded = gan.facts(nets, trainers, noise=False)
        gan.train(nets, trainers, 3)
        jobs.append([layout, path, 3])
        wanted.append({'step': 4, 'loaded': loaded, 'end': gan.facts(nets, trainers)})
    output = subprocess.run([sys.executable, str(ROOT / 'tests' / 'gan_runs.py')], input=json.dumps(jobs), env=ENVIRONMENT,
                            capture_output=True, text=True, check=True).stdout
    assert [json.loads(line) for line in output.splitlines()] == wanted
    assert wanted[0]['loaded'][0]['counts'] != wanted[0]['loaded'][1]['counts']  # of the generator and the discriminator


@pytest.mark.parametrize('background', [False, True])
def test_a_manager(tmp_path, background):
    nets, trainers = trained()
    with go.CheckpointManager(tmp_path, keep_last=2, background=background, keep_best=('score', 'max')) as manager:
        for step, score in ((1, 3.0), (2, 1.0), (3, 2.0)):
            manager.save(step, net=nets, trainer=trainers, metrics={'score': score})
        assert not background or manager.wait() is None
        wanted = gan.facts(nets, trainers, noise=False)
        gan.train(nets, trainers, 2)
        manager.save(4, net=nets, trainer=trainers, metrics={'score': 0.0})
    assert manager.steps() == [1, 3, 4]  # the best, and the last two
    new = gan.make(seed=9)
    restored = go.CheckpointManager(tmp_path).restore_latest(*new)
    assert restored.step == 4 and gan.facts(*new, noise=False) == gan.facts(nets, trainers, noise=False) != wanted
    go.CheckpointManager(tmp_path).restore(3, *new)
    assert gan.facts(*new, noise=False) == wanted
    Path(manager.path(4)).write_bytes(Path(manager.path(4)).read_bytes()[:-1])
    assert go.CheckpointManager(tmp_path).restore_latest(*gan.make(seed=8)).step == 3
    with pytest.raises(TypeError, match='Received: dict and list'):
        manager.save(5, net=nets, trainer=list(trainers.values()))


def test_a_manager_refuses_at_once_what_cannot_be_saved_and_names_it(tmp_path):
    nets, trainers = gan.make()
    trainers['discriminator']._optimizer.lr_scheduler = object()
    manager = go.CheckpointManager(tmp_path / 'run', save_every=100)
    with pytest.raises(TypeError, match=r"^Of 'discriminator': .*object"):
        manager.save(1, net=nets, trainer=trainers)
    assert manager.steps() == []


def test_trainers_alone_nets_alone_and_a_net_without_a_trainer(tmp_path):
    nets, trainers = trained()
    path = str(tmp_path / 'x')
    go.save_checkpoint(path, trainer=trainers)
    gan.train(nets, trainers, 1)
    go.load_checkpoint(path, trainer=trainers)
    assert {name: go.read_states(path, part=name).num_update for name in gan.NAMES} == {'generator': 2, 'discriminator': 4}

    average = gan.make(seed=3)[0]['generator']
    go.save_checkpoint(path, net={**nets, 'average': average}, trainer=trainers)
    new, new_trainers = gan.make(seed=9)
    new['average'] = gan.make(seed=8)[0]['generator']
    restored = go.load_checkpoint(path, net=new, trainer=new_trainers)
    assert sorted(restored.states) == sorted(gan.NAMES)
    assert (new['average'][0].weight.data() == average[0].weight.data()).asnumpy().all()
    assert gan.facts(new, new_trainers, noise=False) == gan.facts(nets, trainers, noise=False)

    go.save_checkpoint(path, net=nets)
    assert go.load_checkpoint(path, net={name: new[name] for name in gan.NAMES}).states is None


def test_one_net_of_several_to_look_at(saved):
    path, nets, _ = saved
    other = gan.make(seed=9)[0]['generator']
    restored = go.load_checkpoint(path, net={'generator': other})
    assert restored.states is None and restored.step == 4 and restored['fold'] == 1
    assert (other[0].weight.data() == nets['generator'][0].weight.data()).asnumpy().all()
    states, run = go.read_checkpoint(path, part='generator')
    assert states.optimizer == 'adamw' and run.step == 4 and run.extra == {'fold': 1}
    assert [weight.name for weight in run.weights] == list(nets['generator']._collect_params_with_prefix())


def test_the_devices_of_all_trainers_are_seeded(tmp_path, monkeypatch):
    """CPUs share one generator, so that draws cannot tell whether a device was forgotten: the calls can."""
    def pairs(devices):
        nets = {name: mx.gluon.nn.Dense(2, in_units=3) for name in gan.NAMES}
        for net, device in zip(nets.values(), devices):
            net.initialize(ctx=mx.cpu(device))
        return nets, {name: mx.gluon.Trainer(net.collect_params(), 'novograd') for name, net in nets.items()}

    def drawn(devices):
        return [mx.nd.random.uniform(shape=3, ctx=mx.cpu(device)).asnumpy().tolist() for device in devices]

    seeded, seed = [], mx.random.seed
    monkeypatch.setattr(mx.random, 'seed', lambda *arguments: (seeded.append(arguments), seed(*arguments)))
    path = str(tmp_path / 'x')
    go.save_checkpoint(path, *pairs([0, 1]))
    wanted = drawn([0, 1])
    go.load_checkpoint(path, *pairs([3, 2]))  # the ids do not matter
    assert drawn([3, 2]) == wanted
    first = seeded[0][0]
    assert seeded == [(first,), (first, mx.cpu(0)), (first + 1, mx.cpu(1)), (first,), (first, mx.cpu(3)), (first + 1, mx.cpu(2))]


def test_states_of_one_into_a_trainer(saved):
    path, nets, trainers = saved
    wanted = go.states_digest(trainers['generator'], nets['generator'])
    new, new_trainers = gan.make(seed=9)
    report = go.load_states(new_trainers['generator'], path, new['generator'], part='generator')
    assert report.step == 2 and go.states_digest(new_trainers['generator'], new['generator']) == wanted


def test_a_single_one_is_written_as_ever(tmp_path):
    nets, trainers = trained()
    path = str(tmp_path / 'x')
    go.save_checkpoint(path, net=nets['generator'], trainer=trainers['generator'])
    manifest = container.read_manifest(path)
    assert manifest['format'] == container.CHECKPOINT and 'parts' not in manifest and '0.weight/mean' in manifest['crc32']


def test_any_reader_of_safetensors_finds_the_arrays(saved):
    path, nets, _ = saved
    load_file = pytest.importorskip('safetensors.numpy').load_file
    arrays = load_file(path)
    weight = nets['discriminator'][0].weight.data().asnumpy()
    assert (arrays['discriminator/_parameters/0.weight'] == weight).all()
    assert {key.split('/')[0] for key in arrays} == set(gan.NAMES)


# All or none

@pytest.mark.parametrize('copying', COPIES, ids=lambda c: c[1])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_load_that_fails_at_any_copy_leaves_both_untouched(tmp_path, monkeypatch, layout, copying):
    path = str(tmp_path / 'x')
    go.save_checkpoint(path, *trained(4, **layout))
    nets, trainers = trained(2, **layout)

    def everything():
        return [snapshot(nets[name], trainers[name]) for name in gan.NAMES]

    before, (owner, name) = everything(), copying
    original = getattr(owner, name)
    for k in range(1, 1000):
        seeds = generators()
        failing = FailAt(original, k)
        monkeypatch.setattr(owner, name, failing)
        try:
            go.load_checkpoint(path, net=nets, trainer=trainers)
            break
        except OutOfMemory:
            pass
        finally:
            monkeypatch.setattr(owner, name, original)
        assert generators() == seeds and everything() == before
    assert failing.calls < k and everything() != before and (k > 8 or name in ('broadcast', 'push'))
    loaded, other = gan.facts(nets, trainers), trained(0, **layout)
    go.load_checkpoint(path, *other)
    assert gan.facts(*other) == loaded


@pytest.mark.filterwarnings('ignore:The names in the file differ')  # of a net without the parameters, and a trainer without the net
@pytest.mark.parametrize('change', [lambda net, trainer: net.update(discriminator=mx.gluon.nn.HybridSequential()),
                                    lambda net, trainer: trainer.update(discriminator=trainer['generator'])])
def test_a_misfit_of_one_changes_neither_and_names_it(saved, change):
    path, *_ = saved
    nets, trainers = trained(2)
    before = [snapshot(nets[name], trainers[name]) for name in gan.NAMES]
    given = dict(nets), dict(trainers)
    change(*given)
    with pytest.raises(ValueError, match=r"^Of 'discriminator': "):
        go.load_checkpoint(path, *given)
    assert [snapshot(nets[name], trainers[name]) for name in gan.NAMES] == before


def test_a_failed_save_leaves_the_file(saved, monkeypatch):
    path, nets, trainers = saved
    before = Path(path).read_bytes()
    extra = mx.gluon.nn.Dense(2)
    extra.initialize()
    with pytest.raises(ValueError, match=r"^Of 'extra': Shapes of parameters must be known"):
        go.save_checkpoint(path, net={**nets, 'extra': extra}, trainer=trainers)
    assert Path(path).read_bytes() == before


# Names

@pytest.mark.parametrize('load', [False, True])
@pytest.mark.parametrize('change, error, words', [
    (lambda n, t: (n['generator'], t), TypeError, 'both be dictionaries, or neither'),
    (lambda n, t: (n, t['generator']), TypeError, 'both be dictionaries, or neither'),
    (lambda n, t: (n, list(t.values())), TypeError, 'both be dictionaries, or neither'),
    (lambda n, t: ({'gen': n['generator']}, t), ValueError, "Received: 'gen' in net, 'generator', 'discriminator' in trainer"),
    (lambda n, t: ({}, {}), ValueError, 'Received: no name in net'),
    (lambda n, t: ({'a/b': n['generator']}, None), ValueError, 'printable text without a slash'),
    (lambda n, t: ({1: n['generator']}, None), ValueError, 'printable text without a slash'),
    (lambda n, t: ({'_parameters': n['generator']}, None), ValueError, 'printable text without a slash'),
    (lambda n, t: ({**n, 'c': None}, t), TypeError, "None for 'c'"),
    (lambda n, t: (n, {'generator': n['generator']}), TypeError, 'must be a gluon.Trainer'),
])
def test_arguments(saved, change, error, words, load):
    path, nets, trainers = saved
    before = Path(path).read_bytes()
    with pytest.raises(error, match=words):
        (go.load_checkpoint if load else go.save_checkpoint)(path, *change(nets, trainers))
    assert Path(path).read_bytes() == before


def test_names_in_the_file(saved, tmp_path, caplog):
    path, nets, trainers = saved
    with pytest.raises(ValueError, match=r"it holds several, 'generator', 'discriminator'. Pass net=\{'generator': net\}"):
        go.load_checkpoint(path, net=nets['generator'])
    with pytest.raises(ValueError, match=r"'generator', 'discriminator'. Received: 'other'"):
        go.load_checkpoint(path, net={'other': nets['generator']})
    one = {'generator': nets['generator']}, {'generator': trainers['generator']}
    for given, skipped in ((one, "'discriminator' is in the file only"),
                           ((nets, one[1]), "the optimizer states of 'discriminator' are in the file only")):
        with pytest.raises(ValueError, match="Received: none for 'discriminator'. Nothing was changed"):
            go.load_checkpoint(path, *given)
        restored = go.load_checkpoint(path, *given, strict=False)
        assert restored.skipped == [skipped] and f'not loaded: {skipped}' in caplog.text
    assert go.load_checkpoint(path, *one, states=False).skipped == []
    for read in (go.read_states, go.read_checkpoint):
        with pytest.raises(ValueError, match=r"`part` must be one of .*'generator', 'discriminator'. Received: None"):
            read(path)
        with pytest.raises(ValueError, match="Received: 'g'"):
            read(path, part='g')
    single = str(tmp_path / 'single')
    go.save_checkpoint(single, net=nets['generator'], trainer=trainers['generator'])
    with pytest.raises(ValueError, match='holds only one. Leave `part` out'):
        go.read_states(single, part='generator')
    with pytest.raises(ValueError, match='holds one net or trainer without a name'):
        go.load_checkpoint(single, net=nets)
    native = str(tmp_path / 'native')
    trainers['generator'].save_states(native)
    for read in (go.read_states, lambda path, part: go.load_states(trainers['generator'], path, part=part)):
        with pytest.raises(ValueError, match="a file of kind 'MXNet states'. Leave `part` out"):
            read(native, part='generator')


# Damage

def test_every_damaged_byte_is_found(saved):
    path, *_ = saved
    whole = Path(path).read_bytes()
    for place in range(0, len(whole), 997):
        Path(path).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
        with pytest.raises(StateFileError):
            container.read_parts(path)
    Path(path).write_bytes(whole[:-1])
    with pytest.raises(StateFileError, match='truncated'):
        go.load_checkpoint(path, *gan.make())


@pytest.mark.parametrize('change, words', [
    (lambda m: m['parts'].pop('generator'), 'must be those of its parts'),
    (lambda m: m.update(parts={}), "'parts' of the manifest"), (lambda m: m.update(parts=[]), "'parts' of the manifest"),
    (lambda m: m.update(version=1), "'version' of the manifest must be 2"),
    (lambda m: m.update(optimizer='adamw'), 'the manifest must have the keys'),
    (lambda m: m.update(format=container.CHECKPOINT), 'the manifest must have the keys'),
    (lambda m: m['run'].update(weights=[]), 'the run must have the keys'),
    (lambda m: m['run'].update(step=-1), "'step' of the run"),
    (lambda m: m['parts'].update({'a/b': m['parts'].pop('generator')}), "'parts' of the manifest"),
    (lambda m: m['parts'].update({'_copies': m['parts'].pop('generator')}), "'parts' of the manifest"),
    (lambda m: m['parts'].update(generator=3), "the part 'generator' must have the keys"),
    (lambda m: m['parts']['generator'].pop('weights'), "the part 'generator' must have the keys"),
    (lambda m: m['parts']['generator'].update(crc32={}), "the part 'generator' must have the keys"),
    (lambda m: m['parts']['generator'].update(num_update=-1), "'num_update' of the part 'generator'"),
    (lambda m: m['parts']['generator']['weights'].pop(), "of the part 'generator', the checksums must be those"),
    (lambda m: m['parts']['generator']['weights'][0].update(name='../a'), "of the part 'generator', 'name' of a weight"),
    (lambda m: m['parts']['generator']['parameters'][0].update(slots=['other']), "of the part 'generator', the checksums"),
])
def test_forged_parts_are_refused(tmp_path, saved, change, words):
    path = Path(saved[0])
    forged(path, lambda manifest: None)
    container.read_parts(path)
    forged(path, change)
    with pytest.raises(StateFileError, match=words):
        container.read_parts(path)


# The command line

@pytest.fixture
def run(capsys):
    def run(*arguments):
        code = main(list(map(str, arguments)))
        return (code, *capsys.readouterr())
    return run


def test_inspect_shows_all_and_one(run, saved, tmp_path):
    path, *_ = saved
    code, output, _ = run('inspect', path)
    assert code == 0 and [line for line in output.splitlines() if line.startswith('==')] == ['== generator', '== discriminator']
    assert 'adamw at update 2' in output and 'novograd at update 4' in output and output.count('run: step 4') == 2
    code, output, _ = run('inspect', path, '--part', 'discriminator')
    assert code == 0 and 'novograd at update 4' in output and 'adamw' not in output and '==' not in output
    found = json.loads(run('inspect', path, '--json')[1])
    assert {name: part['optimizer'] for name, part in found['parts'].items()} == {'generator': 'adamw', 'discriminator': 'novograd'}
    assert json.loads(run('inspect', path, '--part', 'generator', '--json')[1]) == found['parts']['generator']
    refused(run('inspect', path, '--part', 'g'), 2, '--part must be one of', "'generator', 'discriminator'. Received: 'g'")
    refused(run('inspect', path, '--plot', tmp_path / 'x.png'), 2, 'Pass --part generator')


def test_verify_and_diff(run, saved, tmp_path):
    path, nets, trainers = saved
    code, output, _ = run('verify', path)
    assert code == 0 and output.count('every byte matches its checksum') == 2 and output.startswith('generator: checkpoint')
    assert json.loads(run('verify', path, '--json')[1])['complete'] is True
    refused(run('verify', path, '--params', '0.weight,'), 2, 'Pass --part generator')
    assert run('verify', path, '--part', 'generator', '--params', 'other,')[0] == 1
    assert run('diff', path, path)[:2] == (0, 'equal\n')

    other = str(tmp_path / 'other')
    gan.train_one(nets, trainers, 'discriminator')
    go.save_checkpoint(other, net=nets, trainer=trainers, step=4, extra={'fold': 1})
    code, output, _ = run('diff', path, other, '--json')
    changed = {difference['what'].split(':')[0] for difference in json.loads(output)['differences']
               if 'random' not in difference['what'] and 'running' not in difference['what']}
    assert code == 1 and changed == {'discriminator'}
    go.save_checkpoint(other, net={'generator': nets['generator']}, trainer={'generator': trainers['generator']}, step=4)
    found = json.loads(run('diff', path, other, '--json')[1])['differences']
    assert {'what': 'discriminator', 'a': True, 'b': False, 'largest': None, 'elements': None} in found
    go.save_checkpoint(other, net=nets['generator'])
    refused(run('diff', path, other), 2, 'or neither', "'generator', 'discriminator'")


def test_convert_asks_which(run, saved, tmp_path):
    path, nets, _ = saved
    output = tmp_path / 'x.states'
    refused(run('convert', path, '--to', 'mxnet', '-o', output), 1, "'generator', 'discriminator'", "Pass --part 'generator'")
    refused(run('convert', path, '--to', 'safetensors', '-o', output), 1, "Pass --part 'generator'")
    assert not output.exists()
    assert run('convert', path, '--to', 'mxnet', '-o', output, '--part', 'generator')[0] == 0
    assert go.read_states(output).optimizer == 'adamw'
    weights = tmp_path / 'weights.safetensors'
    assert run('convert', path, '--to', 'safetensors', '-o', weights, '--part', 'discriminator')[0] == 0
    model = go.model_to_torch(path, part='discriminator')
    assert list(model.weights) == ['0.weight', '0.bias', '2.weight', '2.bias']
    assert (model.weights['0.weight'] == nets['discriminator'][0].weight.data().asnumpy()).all()
    assert (go.suggest_names(path, part='generator')['0.weight']) == '0.weight'
    assert model.states().optimizer == 'novograd'
    with pytest.raises(ValueError, match="Received: None. Pass part='generator'"):
        go.model_to_torch(path)
    with pytest.raises(ValueError, match='for a dict. Leave `part` out'):
        go.model_to_torch(model.weights, part='generator')
    refused(run('convert', output, '--to', 'torch', '--part', 'generator'), 2, '--part is for checkpoints of several')
