"""Kernels compute what the rule says, bit for bit, whatever the threads, the storage and the list of tensors."""
import gc
import os
import pathlib
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest

pytest.importorskip('numba')

from gluon_optim import rules
from gluon_optim.lowering import numba as loops
from gluon_optim.lowering import numba_runtime as runtime
from gluon_optim.lowering import source
from gluon_optim.lowering.plan import cut
from gluon_optim.rules.base import initial_slot, scalars
from gluon_optim.rules.graph import trace
from gluon_optim.rules.runtimes import runs_on

SHAPES = [(7, 5), (1,), (3, 70001), (5,), (0, 3), (2, 65536)]  # one element, none, several items, exactly two items
LOWERABLE = [name for name in rules.names() if runs_on(rules.get(name), 'kernels')]


def namespace(dtype):
    """NumPy where sums are accumulated in float64 and rounded once, as every executor does."""
    def where(condition, x, y):
        return np.where(condition, *(np.asarray(v, dtype) for v in (x, y)))
    names = {name: getattr(np, name) for name in ('sqrt', 'exp', 'abs', 'minimum', 'maximum')}
    return types.SimpleNamespace(sum=lambda x: np.sum(x, dtype=np.float64).astype(dtype), where=where,
                                 half=lambda x: x.astype(np.float16).astype(x.dtype),
                                 sign=lambda x: np.nan_to_num(np.sign(x)), **names)


def hypers_of(rule):
    """Off their defaults where a number can simply be nudged; clipping on."""
    nudged = {h.name: h.default * 0.9 for h in rule.hypers
              if isinstance(h.default, float) and h.default and h.name not in ('alpha', 'averaging_min')}
    return rule.hyperparameters(**dict(nudged, learning_rate=0.3, clip_gradient=1.5, rescale_grad=0.7))


class Run:
    """The same updates by a kernel and by NumPy, one operation after the other."""

    def __init__(self, rule, h, dtype='float32', master=False, shapes=SHAPES, half_slots=False):
        self.rule, self.h, self.storage = rule, h, loops.Storage(dtype, master, half_slots)
        self.precision = np.dtype(self.storage.precision)
        self.static = rule.static(h)
        self.random = np.random.default_rng(3)
        self.weights = [self.random.normal(size=shape).astype(dtype) for shape in shapes]
        self.masters = [w.astype(np.float32) for w in self.weights] if master else []
        exact = self.masters or self.weights
        self.slots = [{s.name: np.atleast_1d(initial_slot(s, w.astype(self.precision))).astype(self.storage.element(s.name))
                       for s in self.static.slots} for w in exact]
        self.expected = [tuple(values) for values in zip([w.astype(self.precision) for w in exact], map(self.wide, self.slots))]
        self.kernel, self.batch = self.compile(tuple(rule.all_coefficients(scalars, h, 1)), [w.size for w in self.weights])

    def compile(self, names, sizes):
        kernel = loops.kernel(self.rule, self.static, names, self.storage)
        return kernel, loops.Batch(kernel, sizes)

    def wide(self, slots):
        return {name: value.astype(self.storage.element(name)).astype(self.precision) for name, value in slots.items()}

    def point(self, i, arrays):
        self.batch.addresses[:, i] = [arrays[role].ctypes.data for role in self.kernel.roles]

    def namespace(self, i, t):
        return namespace(self.precision)

    def step(self, t, gradients=None):
        gradients = gradients or [self.random.normal(size=w.shape).astype(w.dtype) for w in self.weights]
        # two rows of coefficients: every other parameter is one update behind
        table = [self.rule.all_coefficients(scalars, self.h.replace(learning_rate=0.3 / t), max(t - late, 1)) for late in (0, 1)]
        rows = np.arange(len(self.weights)) % 2
        for i in range(len(self.weights)):
            arrays = dict(self.slots[i], weight=self.masters[i] if self.masters else self.weights[i], gradient=gradients[i],
                          half=self.weights[i])
            self.point(i, arrays)
        self.batch.run([[c[name] for name in self.kernel.coefficients] for c in table], rows)
        for i, (w, slots) in enumerate(self.expected):
            c = {name: self.precision.type(value) for name, value in table[rows[i]].items()}
            with np.errstate(all='ignore'):
                xp = self.namespace(i, t)
                new, new_slots = self.rule.apply(xp, self.static, c, w, gradients[i].astype(self.precision), slots)
            if self.storage.dtype == 'float16' and not self.storage.master:
                new = new.astype(np.float16).astype(np.float32)
            self.expected[i] = new, self.wide(new_slots)

    def check(self):
        for i, (w, slots) in enumerate(self.expected):
            exact = self.masters[i] if self.masters else self.weights[i]
            np.testing.assert_array_equal(exact, w.astype(exact.dtype), err_msg=f'weight {i}')
            np.testing.assert_array_equal(self.weights[i], w.astype(self.weights[i].dtype), err_msg=f'stored weight {i}')
            for name in slots:
                held = self.slots[i][name].reshape(np.shape(slots[name]))
                np.testing.assert_array_equal(held, slots[name], err_msg=f'{name} {i}')


@pytest.mark.parametrize('name', LOWERABLE)
def test_float32_kernel_equals_the_rule_bit_for_bit(name):
    run = Run(rules.get(name), hypers_of(rules.get(name)))
    for t in range(1, 5):
        run.step(t)
    run.check()


@pytest.mark.parametrize('dtype, master', [('float64', False), ('float16', False), ('float16', True)])
@pytest.mark.parametrize('name', ['novograd', 'adamw', 'sgd_torch', 'lans'])
def test_other_storage(name, dtype, master):
    run = Run(rules.get(name), hypers_of(rules.get(name)), dtype, master)
    for t in range(1, 5):
        run.step(t)
    if dtype == 'float64':  # sums of float64 are accumulated in another order than NumPy's
        for w, (expected, _) in zip(run.weights, run.expected):
            np.testing.assert_allclose(w, expected, rtol=0, atol=1e-13)
    else:
        run.check()


@pytest.mark.parametrize('variant', rules.get('novograd').hyper('variant').domain)
@pytest.mark.parametrize('amsgrad', [False, True])
def test_every_novograd(variant, amsgrad):
    if amsgrad and variant not in ('paper', 'jasper'):
        with pytest.raises(ValueError, match='amsgrad'):
            rules.get('novograd').hyperparameters(variant=variant, amsgrad=True)
        return
    run = Run(rules.get('novograd'), rules.get('novograd').hyperparameters(variant=variant, amsgrad=amsgrad, wd=0.1, beta1=0.8))
    for t in range(1, 5):
        run.step(t, [np.zeros_like(w) for w in run.weights] if t == 1 else None)
    run.check()


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch):
    outcomes = []
    for lanes in (1, 2, 3, 7):
        monkeypatch.setattr(runtime, 'lane_count', lambda elements, lanes=lanes: lanes)
        run = Run(rules.get('lans'), hypers_of(rules.get('lans')))
        for t in range(1, 4):
            run.step(t)
        outcomes.append([w.tobytes() for w in run.weights])
    assert outcomes[0] == outcomes[1] == outcomes[2] == outcomes[3]


@pytest.mark.parametrize('bad', [np.inf, -np.inf, np.nan])
def test_infinite_and_undefined_gradients_are_not_hidden(bad):
    for name in ('novograd', 'lans', 'adamw'):
        run = Run(rules.get(name), rules.get(name).hyperparameters(), shapes=[(4, 4)])
        gradient = np.ones((4, 4), np.float32)
        gradient[1, 2] = bad
        run.step(1, [gradient])
        run.check()
        touched = ~np.isfinite(run.weights[0])
        assert touched[1, 2]
        if np.isnan(bad):  # a norm over the parameter carries it everywhere
            assert touched.sum() == (1 if name == 'adamw' else 16)


def test_half_conversions_are_those_of_numpy():
    from numba import njit
    halves = np.arange(65536, dtype=np.uint16)
    floats = halves.view(np.float16).astype(np.float32)
    nearby = (floats.view(np.uint32)[:, None] + np.array([-1, 0, 1, 0xfff, 0x1000, 0x1001], np.int64)).astype(np.uint32).ravel()
    some = np.concatenate([nearby, np.random.default_rng(0).integers(0, 2 ** 32, 200000, dtype=np.uint32)]).view(np.float32)

    def mapped(function, values, dtype):
        @njit
        def loop(values, out):
            for i in range(values.size):
                out[i] = function(values[i])
        out = np.empty(values.shape, dtype)
        loop(values, out)
        return out

    with np.errstate(all='ignore'):
        rounded = some.astype(np.float16).view(np.uint16)
    number = ~np.isnan(some)
    pairs = [(runtime.half_to_float, runtime.float_to_half), (runtime._half_to_float_integer, runtime._float_to_half_integer)]
    for to_float, to_half in pairs:
        back = mapped(to_float, halves, np.float32)
        np.testing.assert_array_equal(back, floats)
        assert np.array_equal(np.signbit(back), np.signbit(floats))
        result = mapped(to_half, some, np.uint16)
        np.testing.assert_array_equal(result[number], rounded[number])
        assert np.isnan(result[~number].view(np.float16)).all()


def test_a_loop_reads_back_what_an_earlier_one_stored():
    """LANS stores its moments in the loop before the last, which reads the new ones: no formula is computed from stale slots."""
    rule = rules.get('lans')
    h = rule.hyperparameters()
    stages = cut(trace(rule, rule.static(h), tuple(rule.all_coefficients(scalars, h, 1))))
    assert [sorted(stage.stores) for stage in stages] == [[], ['mean', 'var'], ['weight']]
    assert sorted(stages[2].loads.values()) == ['mean', 'var']


class Misbehaved(rules.Rule):
    name, summary, hypers = 'misbehaved', '', rules.get('sgd_torch').hypers
    slots = staticmethod(lambda h: ())
    coefficients = staticmethod(lambda xp, h, t: dict(lr=h.learning_rate, wd=h.wd))


@pytest.mark.parametrize('step, error, message', [
    (lambda xp, h, c, w, g, s: (w if w > 0 else -w, {}), TypeError, 'branch'),
    (lambda xp, h, c, w, g, s: (w - (c.lr * c.wd) * g, {}), TypeError, 'Combine them in `coefficients`'),
    (lambda xp, h, c, w, g, s: (w - c.lr * g, {'mean': g}), ValueError, 'every slot'),
    (lambda xp, h, c, w, g, s: (xp.sum(w), {}), TypeError, 'shape of the weight'),
    (lambda xp, h, c, w, g, s: (w - xp.sum(xp.sum(g)) * g, {}), TypeError, 'xp.sum'),
])
def test_a_rule_that_cannot_be_traced_is_told_why(step, error, message):
    rule = type('Bad', (Misbehaved,), {'step': staticmethod(step)})
    h = rule.hyperparameters()
    with pytest.raises(error, match=message):
        trace(rule, rule.static(h), ('lr', 'wd', 'rescale_grad'))


PROCESS = '''
import numba, sys
from numba.core import ccallback
compiled = []
original = ccallback.CFunc._compile_uncached
ccallback.CFunc._compile_uncached = lambda self: compiled.append(1) or original(self)
from gluon_optim import rules
from gluon_optim.lowering import numba as loops
from gluon_optim.rules.base import scalars
rule = rules.get('adamw'); h = rule.hyperparameters()
loops.kernel(rule, rule.static(h), tuple(rule.all_coefficients(scalars, h, 1)), loops.Storage('float32'))
print(len(compiled))
'''


def in_process(cache, code=PROCESS, *arguments, **variables):
    environment = dict(os.environ, GLUON_OPTIM_CACHE=str(cache), **variables)
    return subprocess.run([sys.executable, '-c', code, *arguments], env=environment, capture_output=True, text=True, timeout=300)


def test_second_process_compiles_nothing(tmp_path):
    first, second = in_process(tmp_path / 'cache'), in_process(tmp_path / 'cache')
    assert (first.stdout.split(), second.stdout.split()) == (['1'], ['0']), first.stderr + second.stderr


def test_processes_that_compile_at_once_share_what_they_keep(tmp_path):
    environment = dict(os.environ, GLUON_OPTIM_CACHE=str(tmp_path / 'cache'))
    running = [subprocess.Popen([sys.executable, '-c', PROCESS], env=environment, stdout=subprocess.PIPE, text=True)
               for _ in range(3)]
    assert all(process.communicate(timeout=300)[0].split() in (['1'], ['0']) for process in running)
    assert not any(process.returncode for process in running)
    assert in_process(tmp_path / 'cache').stdout.split() == ['0']
    assert not list((tmp_path / 'cache').glob('*.tmp'))


def test_a_folder_that_cannot_be_written_costs_the_cache_only(tmp_path):
    (tmp_path / 'file').write_text('in the way')
    result = in_process(tmp_path / 'file' / 'cache')
    assert result.stdout.split() == ['1'], result.stderr
    assert result.stderr.count('not kept for the next process') == 1


ON_A_PROCESSOR = '''
import sys
sys.path.insert(0, sys.argv[1])
from test_lowering import Run, hypers_of
from gluon_optim import rules
run = Run(rules.get('lans'), hypers_of(rules.get('lans')), 'float64')
for t in range(1, 4):
    run.step(t)
print(*[w.tobytes().hex() for w in run.weights])
'''


def test_sums_do_not_depend_on_the_processor(tmp_path):
    """The widest vectors of this one, and none: elements are added up in the same order."""
    folder = str(pathlib.Path(__file__).parent)
    results = [in_process(tmp_path / (name or 'this'), ON_A_PROCESSOR, folder, **({'NUMBA_CPU_NAME': name} if name else {}))
               for name in ('', 'generic')]
    assert results[0].stdout == results[1].stdout and len(results[0].stdout) > 1000, results[0].stderr + results[1].stderr


COMPILED = '''
import numba.core.event
names = []
class Listener(numba.core.event.Listener):
    def on_start(self, event):
        names.append(event.data['dispatcher'].py_func.__qualname__)
    def on_end(self, event):
        pass
numba.core.event.register('numba:compile', Listener())
import numpy
from gluon_optim import rules
from gluon_optim.lowering import numba as loops, numba_runtime as runtime
from gluon_optim.rules.base import scalars
rule = rules.get('adamw'); h = rule.hyperparameters()
kernel = loops.kernel(rule, rule.static(h), tuple(rule.all_coefficients(scalars, h, 1)), loops.Storage('float32'))
runtime.launch(kernel.address, 0, 1, 0, 0, 0)
none = numpy.zeros(0, numpy.int64)
runtime.fetch_addresses(0, none, none)
runtime.describe(none, none, none.reshape(0, runtime.DESCRIBED))
print(*sorted(names))
'''


def test_a_first_update_compiles_the_kernel_and_what_it_calls_directly(tmp_path):
    """Functions of numba or NumPy that a kernel uses would be compiled before it, which can take longer than the kernel."""
    result = in_process(tmp_path / 'cache', COMPILED, NUMBA_CACHE_DIR=str(tmp_path / 'numba'))
    assert result.stdout.split() == ['_describe', '_drive_alone', '_fetch_addresses'], result.stderr


def compiled_afresh(monkeypatch, folder, patience):
    """Compile the kernel of LANS with an empty cache in ``folder``; the time when it was ready."""
    monkeypatch.setenv('GLUON_OPTIM_CACHE', str(folder))
    monkeypatch.setattr(source, 'PATIENCE', patience)
    rule = rules.get('lans')
    h = rule.hyperparameters()
    loops.kernel.__wrapped__(rule, rule.static(h), tuple(rule.all_coefficients(scalars, h, 1)), loops.Storage('float32'))
    return time.time()


def announcements(caplog):
    return [record for record in caplog.records if record.message.startswith('Compiling the kernel of lans')]


def wait_for_announcement(caplog):
    """A thread that only waits may get its turn late on a busy machine."""
    for _ in range(6000):
        if announcements(caplog):
            return
        time.sleep(0.01)


def test_a_long_compilation_is_announced_while_it_runs(monkeypatch, tmp_path, caplog):
    execute = source._execute
    monkeypatch.setattr(source, '_execute', lambda *arguments: (execute(*arguments), wait_for_announcement(caplog))[0])
    ready = compiled_afresh(monkeypatch, tmp_path, 0.01)
    [record] = announcements(caplog)
    assert (record.name, record.levelname) == ('gluon_optim', 'WARNING')
    assert record.created < ready
    assert str(tmp_path) in record.message


def test_a_compilation_whose_result_is_not_kept_does_not_promise_it(monkeypatch, tmp_path, caplog):
    (tmp_path / 'file').write_text('in the way')
    monkeypatch.setenv('GLUON_OPTIM_CACHE', str(tmp_path / 'file' / 'cache'))
    monkeypatch.setattr(source, 'PATIENCE', 0.01)
    monkeypatch.setitem(sys.modules, 'waiting', types.SimpleNamespace(wait=lambda: wait_for_announcement(caplog)))
    source.load('lans', 'import waiting; waiting.wait()  # {cache}', pathlib.Path(runtime.__file__))
    assert [record.message for record in announcements(caplog)] == ['Compiling the kernel of lans ...']


def test_a_short_compilation_is_silent(monkeypatch, tmp_path, caplog):
    compiled_afresh(monkeypatch, tmp_path, 3600.0)
    assert announcements(caplog) == []
    waiting = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer) and thread.interval == 3600.0]
    assert all(thread.finished.is_set() for thread in waiting)


@pytest.mark.parametrize('collects', [True, False])
def test_garbage_is_collected_after_a_compilation_as_it_was_before(monkeypatch, tmp_path, collects):
    during = []
    execute = source._execute
    monkeypatch.setattr(source, '_execute', lambda *arguments: during.append(gc.isenabled()) or execute(*arguments))
    (gc.enable if collects else gc.disable)()
    try:
        compiled_afresh(monkeypatch, tmp_path, 3600.0)
        assert (during, gc.isenabled()) == ([False], collects)
    finally:
        gc.enable()


def test_a_kernel_that_does_not_compile_leaves_the_collector_on_and_no_announcement_pending(monkeypatch, tmp_path):
    monkeypatch.setenv('GLUON_OPTIM_CACHE', str(tmp_path))
    monkeypatch.setattr(source, 'PATIENCE', 3601.0)
    with pytest.raises(ZeroDivisionError):
        source.load('broken', '1 / 0  # {cache}', pathlib.Path(runtime.__file__))
    waiting = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer) and thread.interval == 3601.0]
    assert gc.isenabled() and all(thread.finished.is_set() for thread in waiting)
