"""Second derivatives and `minimize` on MXNet 2.0, where `collect_params` returns a plain dictionary, with arrays of mx.np."""
import sys
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip('mxnet')
pytest.importorskip('scipy')
sys.path.insert(0, str(Path(__file__).parent))
from contract_nets import NEWER  # noqa: E402

if not NEWER:
    pytest.skip('for MXNet 2.x', allow_module_level=True)

from mxnet import gluon  # noqa: E402

import gluon_optim as go  # noqa: E402

X, Y = np.random.RandomState(0).standard_normal((2, 40, 3))
INPUTS = np.concatenate([X, np.ones((len(X), 1))], 1)


@pytest.fixture(autouse=True)
def numpy_arrays():
    mx.npx.set_np()
    yield
    mx.npx.reset_np()


def linear_fit():
    net = gluon.nn.Dense(3, in_units=3)
    net.initialize()
    return net, gluon.loss.L2Loss(), (mx.np.array(X, dtype='float32'), mx.np.array(Y, dtype='float32'))


@pytest.mark.parametrize('method', ['newton-cg', 'trust-ncg', 'l-bfgs-b', 'bfgs', 'cg'])
def test_minimize_finds_the_least_squares(method):
    net, loss, data = linear_fit()
    go.minimize(net, loss, data, method)
    best, *_ = np.linalg.lstsq(INPUTS, Y, rcond=None)
    np.testing.assert_allclose(net.weight.data().asnumpy(), best[:3].T, atol=1e-3)
    np.testing.assert_allclose(net.bias.data().asnumpy(), best[3], atol=1e-3)


def test_products_eigenvalues_and_the_trace_of_a_hessian():
    """Of half a mean square over 3 outputs: that of the inputs, divided by 3, once for each output."""
    net, loss, (x, y) = linear_fit()
    hessian = INPUTS.T @ INPUTS / len(X) / 3
    parameters = net.collect_params()
    values = go.curvature.eigenvalues(lambda: loss(net(x), y).mean(), parameters)
    np.testing.assert_allclose(np.ravel(values)[0], np.linalg.eigvalsh(hessian)[-1], rtol=1e-3)
    trace = go.curvature.trace(lambda: loss(net(x), y).mean(), parameters, samples=100)
    assert abs(trace.value - 3 * np.trace(hessian)) < 5 * trace.error + 1e-3
    directions = [mx.np.ones(parameter.shape) for parameter in parameters.values()]
    products, _ = go.curvature.hvp(lambda: loss(net(x), y).mean(), parameters, directions)
    found = np.concatenate([products[0].asnumpy(), products[1].asnumpy()[:, None]], 1)
    np.testing.assert_allclose(found, np.ones((3, 4)) @ hessian, rtol=1e-2, atol=1e-3)
