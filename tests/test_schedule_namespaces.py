"""Schedules in NumPy, PyTorch and JAX, without MXNet: from records, as files hold them."""
import numpy as np
import pytest
from schedule_cases import ALL, Records

import gluon_optim as go

STEPS = 520
TIMES = np.arange(1, STEPS + 1)


@pytest.mark.parametrize('name', ALL)
def test_rates_are_those_of_the_formula(name):
    make, formula = ALL[name]
    np.testing.assert_allclose(go.rate(make(Records()), TIMES), [formula(t) for t in TIMES.tolist()], rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize('name', ALL)
def test_pytorch_agrees_in_double_precision(name):
    torch = pytest.importorskip('torch')
    record = ALL[name][0](Records())
    expected = go.rate(record, TIMES)
    rates = go.rate(record, torch.arange(1, STEPS + 1), torch)
    assert rates.dtype == torch.float64
    np.testing.assert_allclose(rates.numpy(), expected, rtol=1e-13, atol=1e-16)
    assert float(go.rate(record, 7, torch)) == pytest.approx(expected[6], rel=1e-13)


@pytest.mark.parametrize('name', ALL)
def test_jax_agrees_inside_jit(name):
    jax = pytest.importorskip('jax')
    record = ALL[name][0](Records())
    expected = go.rate(record, TIMES)
    for rates in (jax.jit(lambda t: go.rate(record, t, jax.numpy))(TIMES), go.rate(record, jax.numpy.asarray(TIMES), jax.numpy)):
        np.testing.assert_allclose(rates, expected, rtol=2e-5, atol=1e-7)  # its arrays are float32
    assert float(go.rate(record, 7, jax.numpy)) == pytest.approx(expected[6], rel=1e-5)


def test_updates_that_are_none_are_refused_where_they_are_known():
    record = ALL['cosine'][0](Records())
    wrong = [(np, 0), (np, 1.5), (np, [1, 0]), (np, True)]
    torch = pytest.importorskip('torch')
    wrong += [(torch, 0), (torch, torch.tensor([1, 0])), (torch, torch.tensor(1.5))]
    for xp, t in wrong:
        with pytest.raises(ValueError, match='`t` must be an update number, 1 or more'):
            go.rate(record, t, xp)
    jax = pytest.importorskip('jax')
    with pytest.raises(ValueError, match='1 or more'):
        go.rate(record, jax.numpy.asarray([0, 1]), jax.numpy)


def test_whole_quotients_survive_the_compiler():
    """XLA divides by multiplying with the inverse: 41 / 41 is below 1 then."""
    jax = pytest.importorskip('jax')
    factor = {'class': 'mxnet.lr_scheduler.FactorScheduler', 'attributes': dict(
        step=1, factor=0.5, stop_factor_lr=0.0, count=0, base_lr=1.0, warmup_steps=0, warmup_begin_lr=0, warmup_final_lr=1.0,
        warmup_mode='linear')}
    S = Records()
    for n in (41, 47, 55, 61, 82, 83, 94, 97):
        records = [S.InverseTime(0.4, 1.0, n), S.IntervalInverseTime(0.4, 1.0, n), S.Step(n, 0.5), S.CosineRestarts(n),
                   {**factor, 'attributes': dict(factor['attributes'], step=n)}]
        times = np.array([n - 1, n, n + 1, n + 2, 2 * n, 2 * n + 1, 10 * n, 10 * n + 1])
        for record in records:
            rates = jax.jit(lambda t, record=record: go.rate(record, t, jax.numpy))(times)
            np.testing.assert_allclose(rates, go.rate(record, times), rtol=1e-5, atol=1e-6)


class Traced:
    """A number of which nothing is known: arithmetic and comparisons of it are, its truth is not."""

    def __init__(self, value):
        self.value = value

    def __bool__(self):
        raise TypeError('an if on a traced value')


def _operator(name):
    def apply(self, other):
        other = other.value if isinstance(other, Traced) else other
        return Traced(getattr(np.float64(self.value), name)(other))
    return apply


for _name in ('add', 'radd', 'sub', 'rsub', 'mul', 'rmul', 'truediv', 'rtruediv', 'pow', 'rpow', 'lt', 'gt', 'le', 'ge'):
    setattr(Traced, f'__{_name}__', _operator(f'__{_name}__'))


class Functions:
    """The functions that a schedule may use, and no others: what ONNX and a compiler have."""

    def __getattr__(self, name):
        if name not in ('floor', 'cos', 'sqrt', 'exp', 'minimum', 'maximum', 'where'):
            raise AttributeError(f'a schedule may not use {name}')
        return lambda *values: Traced(getattr(np, name)(*(v.value if isinstance(v, Traced) else v for v in values)))


@pytest.mark.parametrize('name', ALL)
def test_a_schedule_is_traceable(name):
    schedule, h = go.schedules.schedule_of(ALL[name][0](Records()))
    for t in (1.0, 45.0, 300.0, 500.0):
        assert schedule.rate(Functions(), h, Traced(t)).value == pytest.approx(ALL[name][1](int(t)), rel=1e-12, abs=1e-16)
