"""An inference turns the weights of convolutions in place into blocks of oneDNN's, and nothing waits for an evaluation.

The compiled kernels read and write MXNet's memory themselves. They are held to MXNet's own operators, which know the layout
and wait for what they need, on a net that is evaluated before the step and between backward and step.
"""
import sys
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip('mxnet')
pytest.importorskip('numba')
from mxnet import autograd, gluon, nd  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from contract_nets import conv_net, images  # noqa: E402

from gluon_optim.mxnet import executors  # noqa: E402

STEPS = 6
LOSS = gluon.loss.SoftmaxCrossEntropyLoss()
HELD = images(99, 256)[0]


def evaluate(net, contexts, how):
    """Outputs of an inference on each context. If nobody waits, of several: some are still running when the step begins."""
    outputs = [net(HELD.as_in_context(context)) for context in contexts for _ in range(1 if how == 'waited' else 4)]
    if how == 'waited':
        for output in outputs:
            output.wait_to_read()
    return outputs


def train(name, before, between, hybridize=False, contexts=(0,), arguments=None):
    """Losses, final weights, and what the evaluations gave.

    ``before`` the forward pass, and ``between`` backward and step: evaluate and wait ('waited'), do not wait ('running'), or
    do not evaluate (None).
    """
    contexts = [mx.cpu(i) for i in contexts]
    net = conv_net(contexts)
    if hybridize:
        net.hybridize(static_alloc=True, static_shape=True)
    trainer = gluon.Trainer(net.collect_params(), name, dict({'learning_rate': 0.02}, **(arguments or {})))
    losses, seen = [], []
    for step in range(STEPS):
        data, label = images(step)
        seen += evaluate(net, contexts, before) if before else []
        with autograd.record():
            parts = [LOSS(net(x), y) for x, y in zip(*(gluon.utils.split_and_load(half, contexts) for half in (data, label)))]
        autograd.backward(parts)
        seen += evaluate(net, contexts, between) if between else []
        trainer.step(8)
        losses.append(parts[0])
    nd.waitall()
    weights = [data for p in net.collect_params().values() for data in p.list_data()]
    return [array.asnumpy() for array in losses + weights + seen]


def both(monkeypatch, *arguments, **options):
    """The same training by compiled loops and by operators."""
    compiled = train(*arguments, **options)
    with monkeypatch.context() as patch:
        patch.setattr(executors, '_compiler', lambda: None)
        return compiled, train(*arguments, **options)


@pytest.mark.parametrize('between', [None, 'waited', 'running'])
@pytest.mark.parametrize('before', [None, 'running'])
@pytest.mark.parametrize('name', ['novograd', 'adamw'])
def test_evaluations_around_the_step(name, before, between, monkeypatch):
    compiled, operators = both(monkeypatch, name, before, between)
    for a, b in zip(compiled, operators):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('options', [dict(hybridize=True), dict(contexts=(0, 1))], ids=['hybridized', 'two contexts'])
def test_evaluations_around_the_step_of_other_nets(options, monkeypatch):
    compiled, operators = both(monkeypatch, 'novograd', 'running', 'running', **options)
    for a, b in zip(compiled, operators):
        np.testing.assert_array_equal(a, b)


def test_an_evaluation_changes_nothing(monkeypatch):
    """A run that is never evaluated is the same run."""
    plain = train('novograd', None, None)
    for between in ('waited', 'running'):
        for a, b in zip(plain, train('novograd', 'running', between)):
            np.testing.assert_array_equal(a, b)
