"""Checkpoints of a run whose weights and states are on MXNet's parameter servers: real processes on this machine.

    GLUON_OPTIM_SERVER_STATES=1 pytest tests/test_server_states.py      every optimizer and every number of servers
"""
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip('mxnet')

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / 'tools'), str(ROOT / 'tests')]
from cluster import ClusterError, run  # noqa: E402
from contract_nets import environment  # noqa: E402
from server_states_worker import SHAPES, found_in, made, train  # noqa: E402

import gluon_optim as go  # noqa: E402
from gluon_optim.rules.mx import DROP_INS  # noqa: E402
from gluon_optim.rules.servers import check_servers  # noqa: E402

STEPS, MIDDLE = 10, 5
BOUND = 100  # arrays of so many elements are divided among the servers
LONG = os.environ.get('GLUON_OPTIM_SERVER_STATES')
WORKER = [sys.executable, str(ROOT / 'tests' / 'server_states_worker.py')]


def cluster(servers, workers=2, deadline=100, bound=BOUND, **options):
    """What the workers found, by rank."""
    variables = environment(MXNET_KVSTORE_BIGARRAY_BOUND=str(bound), OMP_NUM_THREADS='1', GLUON_OPTIM_DEADLINE='30')
    results = run([*WORKER, json.dumps(options)], deadline, workers=workers, servers=servers, environment=variables)
    return sorted((json.loads(result.stdout.splitlines()[-1]) for name, result in results.items() if name.startswith('worker')),
                  key=lambda found: found['rank'])


def alone(options, steps=STEPS, path=None):
    """The same in one process, from the checkpoint at ``path``; that is also what remains to be saved."""
    own = made(options)
    if path is not None:
        own.steps = go.load_checkpoint(path, trainer=own.trainer).step
    train(own, steps, late=options.get('late'))
    return own


def same(found, expected):
    assert found['weights'] == expected['weights']
    assert found['digest'] == expected['digest']


def case(name, dtype, **more):
    arguments = {'multi_precision': True} if dtype == 'float16' else {}
    return {**dict(name=name, dtype=dtype, arguments=arguments, scheduler=True), **more}


def check_continuation(options, before, afters, tmp_path, middle=MIDDLE, steps=STEPS, bound=BOUND):
    """Straight through on ``before`` servers, with a checkpoint in the middle; then from there on others, and in one process."""
    path = str(tmp_path / f'run{before}.safetensors')
    expected = found_in(alone(options, steps))
    for found in cluster(before, save=path, middle=middle, steps=steps, bound=bound, **options):
        same(found, expected)
    same(found_in(alone(options, steps, path)), expected)
    for after in afters:
        for found in cluster(after, load=path, steps=steps, bound=bound, **options):
            same(found, expected)
            assert found['restored'] == [3, middle, f'restored 3 of 3 parameters at step {middle}']


@pytest.mark.parametrize('name, dtype, before, after', [
    ('adamw', 'float32', 2, 3),
    ('adam', 'float16', 3, 1),
    ('dcasgd', 'float32', 1, 2),  # MXNet's servers keep float64 as float32 now and then, see docs/DISTRIBUTED.md
])
def test_a_run_continues_on_another_number_of_servers_and_in_one_process(name, dtype, before, after, tmp_path):
    more = dict(late=True, scheduler=False) if name == 'adamw' else dict(accelerate=name == 'dcasgd')
    check_continuation(case(name, dtype, **more), before, [after], tmp_path)


def may_run(name, dtype, bound):
    """Whether servers take the optimizer."""
    optimizer = go.create(name, **case(name, dtype)['arguments'])
    sizes = {str(shape): int(np.prod(shape)) for shape in SHAPES}
    try:
        check_servers(optimizer.rule, optimizer.hyperparameters(), optimizer.multi_precision, sizes, dtype == 'float16', 3, bound)
    except ValueError:
        return False
    return True


@pytest.mark.skipif(not LONG, reason='GLUON_OPTIM_SERVER_STATES is not set')
@pytest.mark.parametrize('before', [1, 2, 3])
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
@pytest.mark.parametrize('name, accelerate', [
    *((name, False) for name in go.list_optimizers()), *((name, True) for name in DROP_INS)])
def test_every_optimizer_continues_on_every_number_of_servers(name, accelerate, dtype, before, tmp_path):
    if name == 'lars' and not accelerate:
        pytest.skip("MXNet's own corrects the momentum of the parameter that happens to come first")
    bound = BOUND if may_run(name, dtype, BOUND) else 1000  # with which no parameter is cut in parts
    if not may_run(name, dtype, bound):
        pytest.skip('servers do not take it')
    check_continuation(case(name, dtype, accelerate=accelerate), before, [1, 2, 3], tmp_path, 20, 40, bound)


def test_a_checkpoint_of_one_process_continues_on_servers_with_norms_of_whole_parameters(tmp_path):
    """One number per parameter, which a server has, and a parameter that is one number: the rule says which is which."""
    path = str(tmp_path / 'run.safetensors')
    options = dict(name='novograd', dtype='float16', arguments={'multi_precision': True})
    middle = alone(options, MIDDLE)
    go.save_checkpoint(path, trainer=middle.trainer, extra={'fold': 3}, step=MIDDLE)
    expected = found_in(alone(options))
    again = str(tmp_path / 'again.safetensors')
    for found in cluster(2, bound=1000, load=path, save=again, middle=MIDDLE, steps=STEPS, **options):
        same(found, expected)
    saved, loaded = go.read_states(path), go.read_states(again)
    assert [(info.name, info.shape) for info in loaded.parameters] == [(info.name, info.shape) for info in saved.parameters]
    for name, slots in saved.slots.items():
        for slot, array in slots.items():
            assert (loaded.slots[name][slot].shape, loaded.slots[name][slot].tobytes()) == (array.shape, array.tobytes())


def test_an_optimizer_of_somebody_else(tmp_path):
    path = str(tmp_path / 'run.safetensors')
    options = dict(name='following', arguments={}, steps=STEPS)
    first, second = cluster(2, save=path, middle=MIDDLE, **options)
    assert first['digest'] == second['digest']
    for found in cluster(1, load=path, **options):
        same(found, first)


@pytest.mark.parametrize('workers, options', [(1, {}), (2, {})])
def test_asynchronous_updates(workers, options, tmp_path):
    """With one worker they are in one order; with two, what is loaded is what was saved."""
    path, again = str(tmp_path / 'run.safetensors'), str(tmp_path / 'again.safetensors')
    options = dict(name='adamw', kvstore='dist_async', **options)
    found = cluster(2, workers, save=path, middle=MIDDLE, steps=STEPS if workers == 1 else MIDDLE, **options)
    loaded = cluster(3, workers, load=path, save=again, middle=MIDDLE, steps=STEPS if workers == 1 else MIDDLE, **options)
    for one, other in zip(found, loaded):
        assert one['digest'] == other['digest']
    for one in loaded:
        assert one['weights'] == found[0]['weights']
    assert go.read_states(path).counts == go.read_states(again).counts == {f'p{i}_weight': MIDDLE * workers for i in range(3)}


def test_gradient_compression(tmp_path):
    """What is left of rounded gradients is in each worker, and in no checkpoint; all else is restored as it was."""
    path, again = str(tmp_path / 'run.safetensors'), str(tmp_path / 'again.safetensors')
    options = dict(name='sgd_torch', arguments={'momentum': 0.5}, compression={'type': '2bit', 'threshold': 0.5}, middle=MIDDLE)
    saved = cluster(2, save=path, steps=MIDDLE, **options)
    for found in cluster(2, load=path, save=again, steps=MIDDLE, **options):
        same(found, saved[0])


def test_a_load_that_is_refused_changes_nothing(tmp_path):
    path = str(tmp_path / 'run.safetensors')
    go.save_checkpoint(path, trainer=alone(dict(name='adamw'), 2).trainer)
    expected = found_in(alone(dict(name='adamax_torch')))
    for found in cluster(2, do='refused', load=path, name='adamax_torch', steps=STEPS):
        assert len(found['tried']) == 2 and all("The states are of 'adamw'" in text for text in found['tried']), found['tried']
        assert not found['started']
        same(found, expected)


def test_a_worker_that_does_not_save_is_named_after_the_deadline(tmp_path):
    options = dict(do='absent', name='adamw', rank=0, save=str(tmp_path / 'run.states'), sleep=5)
    variables = environment(GLUON_OPTIM_DEADLINE='2', OMP_NUM_THREADS='1')
    with pytest.raises(ClusterError) as raised:
        run([*WORKER, json.dumps(options)], 60, workers=2, servers=1, environment=variables)
    assert 'All 2 workers must call save_states. Received: no call of worker 1 within 2 s.' in str(raised.value)
    assert not (tmp_path / 'run.states').exists()


def test_workers_that_make_different_calls_are_told(tmp_path):
    for found in cluster(1, do='apart', name='adamw', save=str(tmp_path / 'run.states')):
        assert 'All workers must make the same calls.' in found['error']


def test_all_workers_learn_that_a_file_cannot_be_written():
    first, second = cluster(1, do='unwritable', name='adamw')
    assert first['kind'] == 'FileNotFoundError' and '/no/such/folder' in first['error']
    assert 'Worker 0 refused save_states' in second['error'] and '/no/such/folder' in second['error']


@pytest.mark.parametrize('background', [False, True])
def test_a_manager_saves_and_restores_for_all_workers(background, tmp_path):
    """Random numbers of each worker included. Running statistics are those of the first."""
    straight, split = str(tmp_path / 'straight'), str(tmp_path / 'split')
    whole = cluster(2, do='managed', folder=straight, background=background, seed=1, steps=8)
    half = cluster(2, do='managed', folder=split, background=background, seed=1, steps=5)
    rest = cluster(1, do='managed', folder=split, background=background, seed=50, steps=8)
    assert [found['begin'] for found in half + rest] == [0, 0, 4, 4]
    assert whole[0]['steps'] == rest[0]['steps'] == [6, 8] and whole[1]['steps'] == []
    assert rest[0]['path'] == rest[1]['path'] == os.path.join(split, 'step-4.safetensors')
    assert rest[0]['after'] == rest[1]['after']
    for rank in range(2):
        assert rest[rank]['drawn'] == whole[rank]['drawn'][4:]
        assert rest[rank]['digest'] == whole[rank]['digest']
