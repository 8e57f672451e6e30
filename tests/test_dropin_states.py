"""States of the drop-ins for MXNet's own optimizers go through `go.save_states` as those of ours do."""
import numpy as np
import pytest

mx = pytest.importorskip('mxnet')
if mx.__version__.startswith('2'):
    pytest.skip('the drop-ins are for MXNet 1.9.1', allow_module_level=True)

import gluon_optim as go  # noqa: E402
from gluon_optim.rules.mx import DROP_INS  # noqa: E402

gluon = mx.gluon

OPTIONS = {'sgd': {'momentum': 0.9}, 'nag': {'momentum': 0.9}, 'dcasgd': {'momentum': 0.9}, 'lars': {'momentum': 0.9, 'eta': 0.1},
           'lbsgd': {'momentum': 0.9, 'batch_scale': 3, 'warmup_strategy': 'power2'}, 'rmsprop': {'centered': True},
           'signum': {'momentum': 0.9}}


def trainer_of(name, context, half):
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Dense(4, in_units=3), gluon.nn.Dense(2, in_units=4))
    net.initialize(mx.init.Constant(0.1), ctx=context)
    if half:
        net.cast('float16')
    scheduler = mx.lr_scheduler.FactorScheduler(step=2, factor=0.7, base_lr=0.05)
    rate = {} if name == 'adadelta' else {'lr_scheduler': scheduler, 'learning_rate': 0.05}
    optimizer = go.create(name, wd=0.01, multi_precision=half, **rate, **OPTIONS.get(name, {}))
    return net, gluon.Trainer(net.collect_params(), optimizer)


def steps(net, trainer, first, last):
    for step in range(first, last):
        for k, parameter in enumerate(net.collect_params().values()):
            random = np.random.default_rng(100 * step + k)
            for data in parameter.list_data():
                data._fresh_grad = True
            for gradient in parameter.list_grad():
                gradient[:] = mx.nd.array(random.normal(size=parameter.shape), dtype=parameter.dtype, ctx=gradient.context)
        trainer.step(1)


@pytest.mark.parametrize('half', [False, True])
@pytest.mark.parametrize('name', sorted(set(DROP_INS) - {'sgld'}))
def test_resumed_run_is_the_straight_one(name, half, tmp_path):
    net, trainer = trainer_of(name, mx.cpu(0), half)
    steps(net, trainer, 0, 5)
    go.save_states(trainer, tmp_path / 'states', net=net)
    net.save_parameters(str(tmp_path / 'params'))
    steps(net, trainer, 5, 9)

    again, resumed = trainer_of(name, mx.cpu(2), half)
    again.load_parameters(str(tmp_path / 'params'), ctx=mx.cpu(2))
    report = go.load_states(resumed, tmp_path / 'states', net=again)
    assert str(report) == 'restored 4 of 4 parameters at step 5'
    steps(again, resumed, 5, 9)
    assert go.states_digest(resumed, again) == go.states_digest(trainer, net)
    assert resumed.learning_rate == trainer.learning_rate
    for a, b in zip(net.collect_params().values(), again.collect_params().values()):
        np.testing.assert_array_equal(a.data().asnumpy(), b.data().asnumpy())
