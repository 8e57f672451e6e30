"""A folder of checkpoints: what is kept, what is found, and what happens when writing goes wrong."""
import contextlib
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip('mxnet')

import gluon_optim as go  # noqa: E402
from gluon_optim.states import atomic, container  # noqa: E402
from gluon_optim.states.errors import StateFileError  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
import checkpoint_runs as runs  # noqa: E402

ROOT = Path(container.__file__).parents[2]
CONFIG = {'optimizer': 'adamw'}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / 'run'


@pytest.fixture(scope='module')
def pair():
    """A net and trainer that have trained; tests that train on make their own."""
    net, trainer = runs.make(CONFIG)
    runs.train(net, trainer, 1)
    return net, trainer


def save(manager, pair, *steps, **options):
    for step in steps:
        manager.save(step, *pair, **options)


# What is kept

@pytest.mark.parametrize('options, kept', [
    ({}, [18, 19, 20]), ({'keep_last': 1}, [20]), ({'keep_last': None}, list(range(1, 21))),
    ({'keep_last': 2, 'keep_every': 7}, [7, 14, 19, 20]), ({'save_every': 5, 'keep_last': 2}, [15, 20]),
    ({'keep_last': 1, 'background': True}, [20])], ids=str)
def test_retention(folder, pair, options, kept):
    with go.CheckpointManager(folder, **options) as manager:
        save(manager, pair, *range(1, 21))
    assert manager.steps() == kept
    assert sorted(os.listdir(folder)) == sorted(f'step-{step}.safetensors' for step in kept)


@pytest.mark.parametrize('mode, best', [('min', 4), ('max', 6)])
def test_the_best_is_kept_also_by_a_manager_that_did_not_write_it(folder, pair, mode, best):
    values = {1: 0.5, 2: float('nan'), 3: 0.4, 4: 0.1, 5: 0.2, 6: 0.9, 7: 0.3, 8: 0.2}
    for step, value in values.items():  # each by a new one
        manager = go.CheckpointManager(folder, keep_last=1, keep_best=('loss', mode))
        manager.save(step, *pair, metrics={'loss': value, 'other': -value})
    assert manager.steps() == [best, 8]
    manager.save(9, *pair)  # not evaluated
    assert manager.steps() == [best, 9]
    assert container.read_checkpoint(manager.path(best))[1].metrics == {'loss': values[best], 'other': -values[best]}


def test_later_steps_of_a_run_that_was_given_up_are_left_alone(folder, pair):
    save(go.CheckpointManager(folder), pair, 10, 20, 30)
    manager = go.CheckpointManager(folder, keep_last=1)
    with pytest.warns(UserWarning, match=r'later steps 20, 30: .* restore 30, not step 15.*manager.restore\(step') as said:
        save(manager, pair, 15, 16)
    assert len(said) == 1 and said[0].filename == __file__ and manager.steps() == [16, 20, 30]


def test_no_warning_where_later_steps_are_no_mistake(folder, pair, recwarn):
    save(go.CheckpointManager(folder, keep_last=None), pair, 10, 20, 30)
    damage(folder / 'step-30.safetensors', 'cut')
    manager = go.CheckpointManager(folder, keep_last=None)
    assert manager.restore_latest(*pair).step == 20
    save(manager, pair, 25)
    manager = go.CheckpointManager(folder, keep_last=None)
    manager.restore(10, net=pair[0])  # to look at; the run does not go back
    save(manager, pair, 31)
    assert manager.steps() == [10, 20, 25, 30, 31] and not recwarn


@pytest.mark.parametrize('background', [False, True])
def test_going_back_to_an_earlier_step(folder, recwarn, background):
    net, trainer = runs.make(CONFIG)
    with go.CheckpointManager(folder, keep_last=None) as manager:
        for step in (1, 2, 3, 4):
            runs.train(net, trainer, 1)
            manager.save(step, net, trainer, {'branch': 'old'})
            if step == 2:
                wanted = runs.facts(net, trainer)
    with go.CheckpointManager(folder, keep_last=None, background=background) as manager:
        assert manager.restore(np.int64(2), net=net, trainer=trainer) == {'branch': 'old'} and runs.facts(net, trainer) == wanted
        assert manager.steps() == [1, 2, 3, 4]  # nothing has happened yet
        save(manager, (net, trainer), 3, extra={'branch': 'new'})
    assert manager.steps() == [1, 2, 3] and (folder / 'step-4.safetensors.abandoned').exists()
    assert container.read_checkpoint(folder / 'step-3.safetensors.abandoned')[1].extra == {'branch': 'old'}
    assert go.CheckpointManager(folder).restore_latest(net, trainer) == {'branch': 'new'}
    with go.CheckpointManager(folder) as manager:
        save(manager, (net, trainer), 4)
    assert not [warning for warning in recwarn if 'later steps' in str(warning.message)]


def test_a_save_that_fails_after_going_back_loses_nothing(folder, pair, monkeypatch):
    manager = go.CheckpointManager(folder)
    save(manager, pair, 1, 2, 3)
    manager.restore(1, *pair)
    with pytest.raises(TypeError, match='`metrics`'):
        save(manager, pair, 2, metrics=[1])
    assert manager.steps() == [1, 2, 3]
    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', fail)
        with pytest.raises(OSError, match='disk is on fire'):
            save(manager, pair, 2)
    assert go.CheckpointManager(folder).restore_latest(*pair).step == 1  # and not 3, of the branch that was left
    assert len(os.listdir(folder)) == 3
    save(manager, pair, 2)
    assert manager.steps() == [1, 2]


def test_steps_that_cannot_be_restored(folder, pair):
    manager = go.CheckpointManager(folder)
    with pytest.raises(ValueError, match='Received: step=3. Available: none'):
        manager.restore(3, *pair)
    save(manager, pair, 1, 2)
    with pytest.raises(ValueError, match='Received: step=3. Available: 1, 2'):
        manager.restore(3, *pair)
    with pytest.raises(ValueError, match='`step` must be a whole number'):
        manager.restore('2', *pair)


def test_save_every_and_force(folder, pair):
    manager = go.CheckpointManager(folder, save_every=10)
    assert [manager.save(step, *pair) for step in (9, 10, 11)] == [False, True, False]
    assert manager.save(12, *pair, force=True) and manager.steps() == [10, 12]


@pytest.mark.parametrize('options, words', [
    ({'keep_last': 0}, '`keep_last` must be a whole number, 1 or more'), ({'save_every': None}, '`save_every` must'),
    ({'keep_every': 1.5}, '`keep_every` must'), ({'keep_best': 'loss'}, '`keep_best` must be a metric'),
    ({'keep_best': ('loss', 'least')}, "'min' or 'max'")])
def test_bad_options(folder, options, words):
    with pytest.raises(ValueError, match=words):
        go.CheckpointManager(folder, **options)


def test_bad_steps(folder, pair):
    for step in (-1, 1.0, True, '1', None, np.float32(1)):
        with pytest.raises(ValueError, match='`step` must be a whole number'):
            go.CheckpointManager(folder).save(step, *pair)
    assert go.CheckpointManager(folder).steps() == [] and not folder.exists()


def test_whole_numbers_of_numpy(folder, pair):
    manager = go.CheckpointManager(folder, keep_last=np.int64(2), save_every=np.int32(1))
    save(manager, pair, np.int64(3), np.array(4), epoch=np.uint8(1), batch=np.int64(2))
    restored = manager.restore_latest(*pair)
    assert (restored.step, restored.epoch, restored.batch, manager.steps()) == (4, 1, 2, [3, 4])
    with pytest.raises(ValueError, match='`epoch` must be a whole number, 0 or more. Received: epoch=1.5'):
        save(manager, pair, 5, epoch=1.5)


# Metrics

def test_a_misspelt_metric_is_reported_once(folder, pair):
    manager = go.CheckpointManager(folder, keep_last=2, keep_best=('acc', 'max'))
    with pytest.warns(UserWarning, match="'acc' in its metrics. Received for step 1: 'accuracy', 'loss'") as said:
        save(manager, pair, 1, 2, metrics={'accuracy': 0.5, 'loss': 1})
    assert len(said) == 1 and said[0].filename == __file__


def test_a_metric_that_is_never_given_is_reported_before_a_checkpoint_is_deleted(folder, pair, recwarn):
    manager = go.CheckpointManager(folder, keep_last=2, keep_best=('acc', 'max'))
    save(manager, pair, 1, metrics={'acc': float('nan')})
    save(manager, pair, 2)
    assert not recwarn
    with pytest.warns(UserWarning, match='Received for step 3: none'):
        save(manager, pair, 3, 4)
    rated = go.CheckpointManager(folder, keep_last=2, keep_best=('acc', 'max'))
    save(rated, pair, 5, metrics={'acc': 0.5})
    save(rated, pair, 6, 7, 8)  # not evaluated
    assert rated.steps() == [5, 7, 8] and not recwarn


@pytest.mark.parametrize('metrics', [
    ('acc', 0.5), [('acc', 0.5)], {'loss': None}, {'loss': '0.5'}, {'loss': np.ones(2)}, {'loss': mx.nd.ones(2)}, {1: 0.5}])
def test_bad_metrics(folder, metrics):
    net, trainer = runs.make(CONFIG)
    wanted = mx.nd.random.uniform(shape=3).asnumpy().tolist()
    net, trainer = runs.make(CONFIG)
    for save_it in (go.CheckpointManager(folder).save, lambda step, **options: go.save_checkpoint(folder, step=step, **options)):
        with pytest.raises(TypeError, match=r'`metrics` must.*dict\(metric.get_name_value\(\)\)') as caught:
            save_it(1, net=net, trainer=trainer, metrics=metrics)
        assert not isinstance(metrics, dict) or repr(next(iter(metrics))) in str(caught.value)
    assert not folder.exists() and mx.nd.random.uniform(shape=3).asnumpy().tolist() == wanted  # generators were not reseeded


def test_metrics_of_all_kinds_of_numbers(folder, pair):
    both = mx.metric.CompositeEvalMetric([mx.metric.Accuracy(), mx.metric.Loss()])
    both.update([mx.nd.array([1])], [mx.nd.array([[0, 1]])])
    manager = go.CheckpointManager(folder)
    others = {'a': np.float32(2), 'b': np.array(3), 'c': mx.nd.array([4]), 'd': 5}
    save(manager, pair, 1, metrics={**dict(both.get_name_value()), **others})
    assert manager.restore_latest(*pair).metrics == {'accuracy': 1.0, 'loss': 0.5, 'a': 2.0, 'b': 3.0, 'c': 4.0, 'd': 5.0}


# What is found

def test_nothing_yet(folder, pair):
    assert go.CheckpointManager(folder).restore_latest(*pair) is None


def test_position_and_extra_come_back(folder, pair):
    manager = go.CheckpointManager(folder)
    save(manager, pair, 7, extra={'a': [1]}, epoch=2, batch=3, metrics={'loss': 0.5})
    restored = manager.restore_latest(*pair)
    assert (restored, restored.step, restored.epoch, restored.batch, restored.metrics) == ({'a': [1]}, 7, 2, 3, {'loss': 0.5})
    save(manager, pair, 8)
    assert manager.restore_latest(*pair)  # is true, though `extra` is empty


def damage(path, how):
    data = path.read_bytes()
    path.write_bytes({'cut': data[:len(data) // 2], 'empty': b'', 'bit': data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]}[how])


def test_damaged_ones_are_reported_and_passed_over(folder, caplog):
    net, trainer = runs.make(CONFIG)
    manager = go.CheckpointManager(folder, keep_last=None)
    for step in (1, 2, 3, 4):
        runs.train(net, trainer, 1)
        manager.save(step, net, trainer)
        if step == 1:
            wanted = runs.facts(net, trainer)
    for step, how in ((2, 'cut'), (3, 'empty'), (4, 'bit')):
        damage(folder / f'step-{step}.safetensors', how)
    net, trainer = runs.make(CONFIG, seed=5)
    with caplog.at_level(logging.INFO, 'gluon_optim'):
        restored = go.CheckpointManager(folder).restore_latest(net, trainer)
    assert restored.step == 1 and runs.facts(net, trainer) == wanted
    warned = [record.getMessage() for record in caplog.records if record.levelname == 'WARNING']
    assert [line.split('step-')[1][0] for line in warned] == ['4', '3', '2']
    assert all('skipping a damaged checkpoint' in line for line in warned) and 'CRC-32' in warned[0]
    damage(folder / 'step-1.safetensors', 'cut')
    with pytest.raises(StateFileError, match='4 damaged ones, the newest: .*CRC-32.* Move them away'):
        manager.restore_latest(net, trainer)
    assert runs.facts(net, trainer, noise=False) == {key: wanted[key] for key in wanted if key != 'noise'}


def test_what_does_not_fit_is_not_passed_over(folder, pair):
    save(go.CheckpointManager(folder), pair, 1)
    net, trainer = runs.make({'optimizer': 'novograd'})
    with pytest.raises(ValueError, match="states are of 'adamw'"):
        go.CheckpointManager(folder).restore_latest(net, trainer)


def test_other_files_are_no_checkpoints(folder, pair):
    manager = go.CheckpointManager(folder, keep_last=1)
    save(manager, pair, 1)
    for name in ('step-.safetensors', 'step-3.safetensors.bak', 'notes.txt', 'step--4.safetensors', 'step-00000400.safetensors',
                 'step-\u0663.safetensors'):
        (folder / name).write_text('mine')
    (folder / 'step-500.safetensors').mkdir()
    save(manager, pair, 2)
    assert manager.steps() == [2] and len(os.listdir(folder)) == 8


@pytest.mark.skipif(not os.path.exists('/proc/self/mem'), reason='a file that cannot be read at its beginning')
def test_what_cannot_be_read_is_not_passed_over(folder, pair, caplog):
    manager = go.CheckpointManager(folder, keep_last=1, keep_best=('loss', 'min'))
    save(manager, pair, 1, metrics={'loss': 1})
    (folder / 'step-2.safetensors').symlink_to('/proc/self/mem')
    with pytest.raises(OSError, match='Input/output error'):
        manager.restore_latest(*pair)
    save(manager, pair, 3, metrics={'loss': 2})  # the one that cannot be read may be the best
    assert manager.steps() == [1, 2, 3] and 'the best is not known' in caplog.text
    assert go.CheckpointManager(folder, keep_last=1, keep_best=('loss', 'min')).save(4, *pair)  # saving needs no older one


def test_repr_is_how_it_was_made(folder):
    manager = go.CheckpointManager(folder, keep_best=['acc', 'max'])
    assert repr(manager) == (f"CheckpointManager({str(folder)!r}, keep_last=3, keep_every=None, keep_best=('acc', 'max'), "
                             'background=False, save_every=1)')


# Writing in the background

def test_background_writing_writes_the_same(tmp_path):
    """What is written is the state at the time of `save`, whatever training does meanwhile."""
    for name, background in (('a', False), ('b', True)):
        net, trainer = runs.make(CONFIG)
        with go.CheckpointManager(tmp_path / name, keep_last=None, background=background) as manager:
            for step in range(1, 6):
                runs.train(net, trainer, 1)
                manager.save(step, net, trainer, {'step': step})
    for step in range(1, 6):
        left, right = (container.read_checkpoint(tmp_path / name / f'step-{step}.safetensors') for name in 'ab')
        assert left[1].random == right[1].random and left[1].extra == right[1].extra == {'step': step}
        for one, other in zip(left[1].weights, right[1].weights):
            assert one.name == other.name and one.copies[0].tobytes() == other.copies[0].tobytes()
        for slots, others in zip(left[0].slots.values(), right[0].slots.values()):
            assert {key: x.tobytes() for key, x in slots.items()} == {key: x.tobytes() for key, x in others.items()}


def test_what_goes_wrong_in_the_background_is_raised_by_the_next_call(folder, pair, monkeypatch, caplog):
    manager = go.CheckpointManager(folder, background=True)
    save(manager, pair, 1)
    manager.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', fail)
        save(manager, pair, 2)
        while manager._writing.is_alive():
            time.sleep(0.01)
    with pytest.raises(OSError, match='disk is on fire'):
        manager.save(3, *pair)
    assert manager.steps() == [1] and 'step 2 was not written' in caplog.text
    save(manager, pair, 3)
    manager.wait()
    assert manager.steps() == [1, 3] and not [name for name in os.listdir(folder) if name.endswith('.tmp')]


def fail(descriptor):
    raise OSError('the disk is on fire')


def test_a_process_that_ends_finishes_writing(folder):
    script = ("import sys, checkpoint_runs as runs, gluon_optim as go\n"
              "manager = go.CheckpointManager(sys.argv[1], background=True)\n"
              "manager.save(1, *runs.make({'optimizer': 'adamw'}))\n")
    subprocess.run([sys.executable, '-c', script, str(folder)], env=environment(), check=True)
    assert go.CheckpointManager(folder).steps() == [1]


def environment():
    return {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT / 'tests')])}


# When the file system does not play along

@contextlib.contextmanager
def small_disk(path, size='300k', options=''):
    path.mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', f'size={size}{options}', 'none', str(path)]
    if os.geteuid() or subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
        pytest.skip('mounting a file system needs root')
    try:
        yield
    finally:
        subprocess.run(['umount', '-l', str(path)], check=True)


def test_a_full_disk_loses_nothing(folder, pair):
    with small_disk(folder):
        manager = go.CheckpointManager(folder)
        save(manager, pair, 1)
        (folder / 'filler').write_bytes(bytes(300 * 1024 - os.path.getsize(manager.path(1)) - 3 * 4096))
        with pytest.raises(OSError, match=r'No space left on device: .*step-2\.safetensors'):
            save(manager, pair, 2)
        assert manager.steps() == [1] and manager.restore_latest(*pair).step == 1
        assert sorted(os.listdir(folder)) == ['filler', 'step-1.safetensors']
        (folder / 'filler').unlink()
        save(manager, pair, 2)
        assert manager.steps() == [1, 2]


def test_a_limit_on_the_size_of_files_loses_nothing(folder, pair):
    """What a quota does, for those who may not mount anything."""
    manager = go.CheckpointManager(folder)
    save(manager, pair, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
        with pytest.raises(OSError, match=r'File too large: .*step-2\.safetensors'):
            save(manager, pair, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert os.listdir(folder) == ['step-1.safetensors'] and manager.restore_latest(*pair).step == 1


def test_a_folder_that_cannot_be_written_to(folder, pair):
    with small_disk(folder, '2m'):
        save(go.CheckpointManager(folder), pair, 1)
        subprocess.run(['mount', '-o', 'remount,ro', str(folder)], check=True)
        manager = go.CheckpointManager(folder)
        with pytest.raises(OSError, match=r'Read-only file system: .*step-2\.safetensors'):
            save(manager, pair, 2)
        assert manager.restore_latest(*pair).step == 1  # reading needs no writing


def test_no_folder_can_be_made(tmp_path, pair):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='file'):
        save(go.CheckpointManager(tmp_path / 'file' / 'run'), pair, 1)


def test_readers_see_whole_files_while_one_is_replaced(folder, pair):
    manager = go.CheckpointManager(folder)
    save(manager, pair, 1)
    stop, seen, failures = threading.Event(), [], []

    def read():
        while not stop.is_set():
            try:
                seen.append(container.read_checkpoint(manager.path(1))[1].extra['n'])
            except Exception as error:
                failures.append(error)

    save(manager, pair, 1, extra={'n': 0})
    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for n in range(1, 30):
        save(manager, pair, 1, extra={'n': n})
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures and len(set(seen)) > 5 and set(seen) <= set(range(30))


def test_what_killed_writers_left_is_removed_and_what_living_ones_write_is_not(folder, pair):
    folder.mkdir()
    dead, foreign = folder / ('.step-4.safetensors.' + 'ab' * 8 + '.tmp'), folder / ('.other.' + 'ab' * 8 + '.tmp')
    dead.write_bytes(b'half a checkpoint')
    foreign.write_bytes(b'not ours')
    with atomic.replacing(folder / 'step-5.safetensors') as living:
        save(go.CheckpointManager(folder), pair, 6)
        assert not dead.exists() and foreign.exists()
        assert len([name for name in os.listdir(folder) if name.endswith('.tmp')]) == 2
        living.write(b'whole')
    assert (folder / 'step-5.safetensors').read_bytes() == b'whole'


# SIGTERM

TERMINATED = """
import sys, checkpoint_runs as runs, gluon_optim as go
net, trainer = runs.make({'optimizer': 'adamw'})
manager = go.CheckpointManager(sys.argv[1], save_every=10 ** 6, background=True)
with manager.on_sigterm():
    for step in range(1, 10 ** 6):
        runs.train(net, trainer, 1)
        print(step, go.states_digest(trainer, net), flush=True)
        manager.save(step, net, trainer)
"""


def test_sigterm_saves_once_at_the_end_of_the_step_and_ends_the_process(folder):
    process = subprocess.Popen([sys.executable, '-c', TERMINATED, str(folder)], env=environment(), stdout=subprocess.PIPE,
                               text=True)
    said = [process.stdout.readline().strip() for _ in range(3)]
    process.send_signal(signal.SIGTERM)
    said += process.stdout.read().splitlines()
    assert process.wait() == -signal.SIGTERM
    net, trainer = runs.make(CONFIG)
    restored = go.CheckpointManager(folder).restore_latest(net, trainer)
    assert f'{restored.step} {go.states_digest(trainer, net)}' == said[-1]


def test_handlers_are_restored_and_get_the_signal(folder, pair):
    got = []
    manager = go.CheckpointManager(folder, save_every=1000)
    previous = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    mine = signal.getsignal(signal.SIGTERM)
    try:
        with manager.on_sigterm():
            assert not manager.save(1, *pair)
            os.kill(os.getpid(), signal.SIGTERM)
            assert not got and manager.save(2, *pair) and got == [signal.SIGTERM]
            assert not manager.save(3, *pair) and signal.getsignal(signal.SIGTERM) is mine
        with manager.on_sigterm():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # who asks twice does not want to wait
            assert len(got) == 2 and not manager.save(4, *pair)
        with manager.on_sigterm():
            pass
        assert signal.getsignal(signal.SIGTERM) is mine
        assert manager.steps() == [2]
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_signals_are_for_the_main_thread(folder):
    errors = []

    def run():
        try:
            with go.CheckpointManager(folder).on_sigterm():
                pass
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert 'must be called in the main thread' in errors[0]
