"""Second derivatives: products with the Hessian, its eigenvalues and its trace, against NumPy; and that nothing is left behind."""
import re
import sys
from pathlib import Path

import numpy
import pytest

mx = pytest.importorskip('mxnet')
pytest.importorskip('scipy')

from mxnet import autograd, gluon, nd  # noqa: E402
from mxnet.gluon import nn  # noqa: E402

import gluon_optim as go  # noqa: E402
from gluon_optim.mxnet import objective  # noqa: E402

SIZE = 5  # pixels in each direction


# The same nets in NumPy: the loss alone, for complex weights. Its gradient is taken by complex steps, which do not round.

def log_loss(outputs, labels):
    return numpy.mean(numpy.log(numpy.exp(outputs).sum(1)) - outputs[numpy.arange(len(labels)), labels])


def dense(x, weight, bias):
    return x.reshape(len(x), -1) @ weight.T + bias


def conv(x, weight, bias):
    """3 x 3, no padding."""
    size = x.shape[2] - 2
    patches = numpy.stack([x[:, :, i:i + size, j:j + size] for i in range(3) for j in range(3)], -1)
    return numpy.einsum('ncyxk,ock->noyx', patches, weight.reshape(*weight.shape[:2], 9)) + bias[:, None, None]


def batch_norm(x, gamma, beta):
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    shape = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
    centered = x - x.mean(axes, keepdims=True)
    scale = gamma.reshape(shape) / numpy.sqrt((centered * centered).mean(axes, keepdims=True) + 1e-5)
    return centered * scale + beta.reshape(shape)


def relu(x):
    return x * (x.real > 0)


def sigmoid(x):
    return 1 / (1 + numpy.exp(-x))


class Net:
    """A net of Gluon, float64, with data, and the same in NumPy."""

    def __init__(self, layers, forward, shape, classes=3, dtype='float64'):
        random = numpy.random.RandomState(0)
        self.x, self.labels = random.standard_normal((8, *shape)), random.randint(0, classes, 8)
        self.net = nn.HybridSequential()
        self.net.add(*layers(), nn.Dense(classes))
        self.net.initialize()
        self.net.cast(dtype)
        self.data = nd.array(self.x, dtype=dtype)
        self.net(self.data)
        self.params = self.net.collect_params()
        self.trained = [parameter for parameter in self.params.values() if parameter.grad_req != 'null']
        for parameter in self.trained:
            values = 0.5 * random.standard_normal(parameter.shape) + parameter.name.endswith('gamma')
            parameter.set_data(nd.array(values, dtype=dtype))
        self.forward = forward
        self.weights = numpy.concatenate([parameter.data().asnumpy().ravel() for parameter in self.trained]).astype('float64')
        self.cross_entropy = gluon.loss.SoftmaxCrossEntropyLoss()

    def loss(self):
        return self.cross_entropy(self.net(self.data), nd.array(self.labels)).mean()

    def pieces(self, vector):
        ends = numpy.cumsum([parameter.data().size for parameter in self.trained])
        return [piece.reshape(parameter.shape) for piece, parameter in zip(numpy.split(vector, ends[:-1]), self.trained)]

    def numpy_loss(self, vector):
        return log_loss(self.forward(self.x, *self.pieces(vector)), self.labels)

    def numpy_gradient(self, vector):
        steps = 1e-30j * numpy.eye(len(vector))
        return numpy.array([self.numpy_loss(vector + step).imag for step in steps]) / 1e-30

    def numpy_product(self, direction, h=1e-5):
        step = h * direction
        return (self.numpy_gradient(self.weights + step) - self.numpy_gradient(self.weights - step)) / (2 * h)

    def direction(self):
        return numpy.random.RandomState(1).standard_normal(len(self.weights))

    def product(self, direction):
        found, method = go.curvature.hvp(self.loss, self.params, self.pieces(direction))
        return numpy.concatenate([each.asnumpy().ravel() for each in found]), method


NETS = {
    'softmax': (lambda: [], dense, (4,)),
    'dense': (lambda: [nn.Dense(3, activation='tanh')], lambda x, w, b, u, c: dense(numpy.tanh(dense(x, w, b)), u, c), (4,)),
    'convolution': (lambda: [nn.Conv2D(2, 3, activation='relu')],
                    lambda x, w, b, u, c: dense(relu(conv(x, w, b)), u, c), (1, SIZE, SIZE)),
    'batch norm': (lambda: [nn.Dense(3), nn.BatchNorm(), nn.Activation('sigmoid')],
                   lambda x, w, b, gamma, beta, u, c: dense(sigmoid(batch_norm(dense(x, w, b), gamma, beta)), u, c), (4,)),
    'convolution, batch norm': (
        lambda: [nn.Conv2D(2, 3), nn.BatchNorm(), nn.Activation('relu')],
        lambda x, w, b, gamma, beta, u, c: dense(relu(batch_norm(conv(x, w, b), gamma, beta)), u, c), (1, SIZE, SIZE)),
}


def relative(found, right):
    return numpy.linalg.norm(found - right) / numpy.linalg.norm(right)


@pytest.mark.parametrize('hybrid', [False, True], ids=['', 'hybridized'])
@pytest.mark.parametrize('name', NETS)
def test_products_are_those_of_numpy(name, hybrid):
    net = Net(*NETS[name])
    if hybrid:
        net.net.hybridize(static_alloc=True, static_shape=True)
    direction = net.direction()
    found, method = net.product(direction)
    assert method == 'differences'
    assert relative(found, net.numpy_product(direction)) < 1e-7


@pytest.mark.parametrize('name', NETS)
def test_products_of_float32(name):
    net = Net(*NETS[name], dtype='float32')
    direction = net.direction()
    assert relative(net.product(direction)[0], net.numpy_product(direction)) < 5e-3


def test_products_do_not_depend_on_the_length_of_the_vector():
    net = Net(*NETS['dense'])
    direction = net.direction()
    once, _ = net.product(direction)
    for factor in (1e-6, 1e6):
        assert relative(net.product(factor * direction)[0], factor * once) < 1e-8
    assert not net.product(0 * direction)[0].any()


# Exact or not

def parameter(values, name='w', dtype='float64'):
    made = gluon.Parameter(name, shape=numpy.shape(values), dtype=dtype)
    made.initialize()
    made.set_data(nd.array(values, dtype=dtype))
    return made


def summed(array):
    """The sum of (1, n), by the only operator of MXNet that sums and has a second derivative."""
    return nd.FullyConnected(array, nd.ones((1, array.shape[1]), dtype=array.dtype), no_bias=True, num_hidden=1)


OPERATORS = {**{name: getattr(nd, name) for name in [
    'abs', 'arccos', 'arcsin', 'arctan', 'arctanh', 'cbrt', 'cos', 'cosh', 'exp', 'expm1', 'log', 'log10', 'log1p', 'log2',
    'negative', 'rcbrt', 'reciprocal', 'relu', 'rsqrt', 'sigmoid', 'sin', 'sinh', 'sqrt', 'square', 'tan', 'tanh']},
    'elemwise_add': lambda x: nd.elemwise_add(x, nd.square(x)), 'add_n': lambda x: nd.add_n(x, nd.square(x)),
    'plus': lambda x: nd.square(x + 2), 'minus': lambda x: nd.square(x - 2), 'transpose': lambda x: nd.transpose(nd.transpose(x))}


@pytest.mark.parametrize('name', OPERATORS)
def test_operators_with_second_derivatives(name):
    w = parameter([[0.3, -0.7, 1.1, -2]])
    problem = objective.Objective([lambda: summed(OPERATORS[name](nd.sigmoid(w.data())))], [w])
    vector = numpy.array([1.0, 2, -1, 0.5])
    with problem:
        found = problem.product(vector)
        assert problem.method == 'exact'
        assert relative(found, problem._differences(vector)) < 1e-7


def test_a_second_derivative_that_is_wrong_without_an_error_is_not_used():
    """That of FullyConnected: 0 where it is not."""
    x, w = nd.array([[1, 2], [3, -1], [0.5, 1]], dtype='float64'), parameter([[0.3, -0.7]])

    def loss():
        return summed(nd.transpose(nd.square(nd.FullyConnected(x, w.data(), no_bias=True, num_hidden=1))))
    with autograd.record():
        first = autograd.grad(loss(), [w.data()], create_graph=True, retain_graph=True)
    assert not autograd.grad(first, [w.data()])[0].asnumpy().any()  # what MXNet says
    product, method = go.curvature.hvp(loss, [w], [nd.array([[1, 1]])])
    assert method == 'differences'
    assert relative(product[0].asnumpy(), 2 * numpy.array([[1, 1]]) @ (x.asnumpy().T @ x.asnumpy())) < 1e-8


class Square(autograd.Function):
    def forward(self, x):
        self.save_for_backward(x)
        return x * x

    def backward(self, gradient):
        x, = self.saved_tensors
        return 2 * x * gradient


@pytest.mark.parametrize('operator, right', [
    (lambda x: Square()(x), 2), (nd.arcsinh, -1.3 * (1 + 1.3 ** 2) ** -1.5), (nd.arccosh, -1.3 * (1.3 ** 2 - 1) ** -1.5)],
    ids=['Function', 'arcsinh', 'arccosh'])
def test_operators_without_second_derivatives(operator, right):
    """MXNet's of arcsinh and arccosh are wrong without an error."""
    w = parameter([[1.3]])
    product, method = go.curvature.hvp(lambda: operator(w.data()), [w], [nd.array([[3]])])
    assert method == 'differences'
    assert relative(product[0].asnumpy(), numpy.array([[3 * right]])) < 1e-8


# Nothing is left behind

def everything(net):
    return [array.asnumpy().tobytes() for parameter in net.params.values() for array in
            parameter.list_data() + (parameter.list_grad() if parameter.grad_req != 'null' else [])] + [
        parameter.data()._fresh_grad for parameter in net.trained]


def trained_once(name):
    net = Net(*NETS[name])
    for parameter_ in net.trained:
        parameter_.grad_req = 'add'
    with autograd.record():
        loss = net.loss()
    loss.backward()
    return net


@pytest.mark.parametrize('name', ['convolution, batch norm', 'convolution'])
@pytest.mark.parametrize('compute', [
    lambda net: net.product(net.direction()),
    lambda net: go.curvature.eigenvalues(net.loss, net.params),
    lambda net: go.curvature.trace(net.loss, net.trained, samples=2),  # the list does not hold the moving statistics
], ids=['hvp', 'eigenvalues', 'trace'])
def test_nothing_is_left_behind(name, compute):
    net = trained_once(name)
    before = everything(net)
    compute(net)
    assert everything(net) == before
    net.net(net.data)  # MXNet permutes the weights of convolutions for inference
    compute(net)
    assert everything(net) == before


@pytest.mark.parametrize('calls', range(1, 8))
def test_nothing_is_left_behind_by_an_error(calls):
    net = trained_once('convolution, batch norm')
    before, loss, left = everything(net), net.loss, iter(range(calls))

    def failing():
        value = loss()
        if next(left, None) is None:
            raise KeyboardInterrupt
        return value
    net.loss = failing
    if calls < 5:
        with pytest.raises(KeyboardInterrupt):
            net.product(net.direction())
    else:
        net.product(net.direction())
    assert everything(net) == before
    assert gluon.Parameter._check_and_get.__qualname__ == 'Parameter._check_and_get'


def test_evaluation_mode_uses_the_moving_statistics():
    net = Net(*NETS['batch norm'])
    direction = net.pieces(net.direction())
    found, _ = go.curvature.hvp(net.loss, net.params, direction, train_mode=False)
    running = lambda x, gamma, beta: x * gamma / numpy.sqrt(1 + 1e-5) + beta  # noqa: E731  mean 0, variance 1
    net.forward = lambda x, w, b, gamma, beta, u, c: dense(sigmoid(running(dense(x, w, b), gamma, beta)), u, c)
    assert relative(numpy.concatenate([each.asnumpy().ravel() for each in found]), net.numpy_product(net.direction())) < 1e-7


# Parameters of many kinds

def test_several_devices():
    contexts = [mx.cpu(0), mx.cpu(1)]
    w = gluon.Parameter('w', shape=(3,), dtype='float64')
    w.initialize(ctx=contexts)
    w.set_data(nd.array([1, 2, 3], dtype='float64'))
    only = parameter([1, 2, 3])

    def loss():
        first, second = w.data(contexts[0]), w.data(contexts[1])
        return (first ** 4).sum() + (second ** 3).sum().as_in_context(contexts[0])
    on_two, _ = go.curvature.hvp(loss, [w], [nd.ones(3)])
    on_one, _ = go.curvature.hvp(lambda: (only.data() ** 4).sum() + (only.data() ** 3).sum(), [only], [nd.ones(3)])
    assert relative(on_two[0].asnumpy(), on_one[0].asnumpy()) < 1e-9
    second_alone, _ = go.curvature.hvp(lambda: (w.data(contexts[1]) ** 3).sum(), [w], [nd.ones(3)])
    assert relative(second_alone[0].asnumpy(), 6 * numpy.array([1, 2, 3])) < 1e-9
    assert [array.asnumpy().tolist() for array in w.list_data()] == [[1, 2, 3]] * 2


def test_parameters_that_are_unused_shared_frozen_or_have_sparse_gradients():
    embedding, unused, frozen = nn.Embedding(4, 2, sparse_grad=True), parameter([5.0]), parameter([2.0])
    embedding.initialize()
    embedding.cast('float64')
    frozen.grad_req = 'null'
    weight = embedding.weight

    def loss():
        return (embedding(nd.array([0, 2, 2])) ** 2).sum() * frozen.data()
    found, _ = go.curvature.hvp(loss, [weight, unused, frozen, weight], [nd.ones((4, 2)), nd.ones(1)])
    assert [each.shape for each in found] == [(4, 2), (1,)]
    assert relative(found[0].asnumpy(), numpy.array([[4, 4], [0, 0], [8, 8], [0, 0]])) < 1e-9
    assert found[1].asnumpy() == [0]


def test_arrays_of_mxnets_numpy():
    mx.npx.set_np()
    try:
        net = nn.Dense(1, use_bias=False, in_units=2)
        net.initialize()
        x = mx.np.array([[1, 0], [0, 3]], dtype='float32')
        found, _ = go.curvature.hvp(lambda: (net(x) ** 2).sum() / 2, net.collect_params(), [mx.np.ones((1, 2))])
        assert isinstance(found[0], mx.np.ndarray)
        assert relative(found[0].asnumpy(), numpy.array([[1, 9]])) < 1e-3
    finally:
        mx.npx.reset_np()


# Eigenvalues and trace

def quadratic(spectrum, dtype='float64'):
    """A loss with these eigenvalues, in a random basis."""
    basis, _ = numpy.linalg.qr(numpy.random.RandomState(0).standard_normal((len(spectrum), len(spectrum))))
    matrix = nd.array(basis * spectrum @ basis.T, dtype=dtype)
    w = parameter(numpy.ones((1, len(spectrum))), dtype=dtype)
    return lambda: (nd.dot(w.data(), matrix) * w.data()).sum() / 2, [w]


@pytest.mark.parametrize('k, which, right', [
    (1, 'LA', [7]), (3, 'LA', [2, 4, 7]), (2, 'SA', [-9, -1]), (2, 'LM', [-9, 7]), (3, 'BE', [-9, 4, 7]), (7, 'LA', None)])
def test_eigenvalues_of_a_known_spectrum(k, which, right):
    spectrum = numpy.array([-9, -1, 0, 0.5, 1, 2, 4, 7])
    found = go.curvature.eigenvalues(*quadratic(spectrum), k=k, which=which)
    assert abs(found - (spectrum[1:] if right is None else right)).max() < 1e-6
    single = go.curvature.eigenvalues(*quadratic(spectrum, 'float32'), k=k, which=which)
    assert abs(single - (spectrum[1:] if right is None else right)).max() < 1e-2


@pytest.mark.parametrize('name', NETS)
def test_eigenvalues_and_trace_of_a_net(name):
    net = Net(*NETS[name])
    hessian = numpy.array([net.numpy_product(row) for row in numpy.eye(len(net.weights))])
    right = numpy.linalg.eigvalsh((hessian + hessian.T) / 2)
    found = go.curvature.eigenvalues(net.loss, net.params, k=4, which='BE')
    assert abs(found - right[[0, 1, -2, -1]]).max() < 1e-6 * right[-1]
    value, error = go.curvature.trace(net.loss, net.params, samples=80)
    assert abs(value - numpy.trace(hessian)) < 3 * error < right[-1]


def test_the_error_of_a_trace_is_that_of_its_estimates():
    """19 of 20 estimates should be within two errors: of 25, fewer than 19 are in one of a thousand cases."""
    problem = quadratic(numpy.arange(-3.0, 12))
    estimates = [go.curvature.trace(*problem, samples=20, seed=seed) for seed in range(25)]
    assert sum(abs(value - 60) < 2 * error for value, error in estimates) >= 19
    assert numpy.std([value for value, _ in estimates]) == pytest.approx(numpy.mean([error for _, error in estimates]), rel=0.4)
    assert go.curvature.trace(*problem, samples=20, seed=1) == estimates[1] != estimates[2]


def test_the_largest_eigenvalue_is_the_limit_of_the_learning_rate():
    loss, (w,) = quadratic(numpy.array([0.5, 1, 3, 8]))
    largest, = go.curvature.eigenvalues(loss, [w])
    for factor, falls in ((1.9, True), (2.1, False)):
        w.set_data(nd.ones((1, 4), dtype='float64'))
        trainer = gluon.Trainer([w], 'sgd', {'learning_rate': factor / largest, 'momentum': 0, 'wd': 0})
        losses = []
        for _ in range(60):
            with autograd.record():
                value = loss()
            value.backward()
            trainer.step(1)
            losses.append(value.asscalar())
        assert (losses[-1] < losses[0]) == falls


# What is refused

def hvp_of(loss, params=None, vectors=None, **options):
    def call():
        w = parameter([1.0, 2])
        return go.curvature.hvp(lambda: loss(w), [w] if params is None else params(w),
                                [nd.ones(2)] if vectors is None else vectors, **options)
    return call


def square(w):
    return (w.data() ** 2).sum()


def eigenvalues_of(**options):
    def call():
        w = parameter([1.0, 2])
        return go.curvature.eigenvalues(lambda: square(w), [w], **options)
    return call


def uninitialized(w):
    return [gluon.Parameter('new', shape=(2,))]


def deferred(w):
    net = nn.Dense(2)
    net.initialize()
    return net.collect_params()


@pytest.mark.parametrize('call, error, said', [
    (hvp_of(square, lambda w: w), TypeError, 'list of Parameters'),
    (hvp_of(square, lambda w: nn.Dense(2)), TypeError, 'net.collect_params'),
    (hvp_of(square, lambda w: []), ValueError, 'at least one trainable parameter'),
    (hvp_of(square, lambda w: [parameter([1, 2], dtype='float16')]), ValueError, r"float16. Write net.cast\('float32'\)"),
    (hvp_of(square, uninitialized), ValueError, 'new, which is not'),
    (hvp_of(square, deferred), ValueError, 'one forward pass'),
    (hvp_of(lambda w: w.data() ** 2), ValueError, r'one element. Received: the shape \(2,\)'),
    (hvp_of(lambda w: 1.0), ValueError, 'Received: float'),
    (hvp_of(lambda w: square(w) * numpy.nan), ValueError, 'must be finite. Received: nan'),
    (hvp_of(lambda w: nd.ones(1)), ValueError, "none of 'w'"),
    (hvp_of(lambda w: nd.Dropout(nd.tile(w.data(), 50), p=0.5).sum()), ValueError, 'train_mode=False'),
    (hvp_of(square, vectors=[]), ValueError, '1 trainable parameters. Received: 0'),
    (hvp_of(square, vectors=nd.ones(2)), ValueError, 'Received: NDArray'),
    (hvp_of(square, vectors=[nd.ones(3)]), ValueError, r'Received: \(3,\) for w'),
    (hvp_of(square, vectors=[[1, 2]]), TypeError, 'Received: list for w'),
    (hvp_of(square, vectors=[nd.array([1, numpy.inf])]), ValueError, '1 of 2 elements'),
    (eigenvalues_of(k=2), ValueError, 'less than the number of weights, 2. Received: k=2'),
    (eigenvalues_of(k=0), ValueError, '`k`'),
    (eigenvalues_of(which='LR'), ValueError, "'LR'"),
    (eigenvalues_of(seed=-1), ValueError, '`seed`'),
    (lambda: go.curvature.eigenvalues(*quadratic(numpy.arange(50.0)), k=5, tol=1e-15, maxiter=1), ValueError, 'must converge'),
    (lambda: go.curvature.trace(*quadratic(numpy.ones(2)), samples=1), ValueError, '`samples`'),
])
def test_what_is_refused(call, error, said):
    with pytest.raises(error, match=said):
        call()


def test_dropout_is_taken_where_it_does_nothing_or_is_seeded():
    w = parameter([1.0, 2])
    found, _ = go.curvature.hvp(lambda: nd.Dropout(w.data() ** 2, p=0.5).sum(), [w], [nd.ones(2)], train_mode=False)
    assert relative(found[0].asnumpy(), numpy.array([2, 2])) < 1e-9

    def seeded():
        mx.random.seed(3)
        return nd.Dropout(w.data() ** 2, p=0.5).sum()
    found, _ = go.curvature.hvp(seeded, [w], [nd.ones(2)])
    assert set(found[0].asnumpy().round(6)) <= {0, 4}


def test_without_scipy_eigenvalues_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'scipy.sparse.linalg', None)
    with pytest.raises(ImportError, match=r"needs SciPy.*pip install '.\[curvature\]'"):
        eigenvalues_of()()
    assert go.curvature.hvp(*quadratic(numpy.ones(2)), [nd.ones((1, 2))])[1] == 'differences'


# The page

def test_the_blocks_of_its_page_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip('sklearn')
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).resolve().parent.parent / 'docs/CURVATURE.md').read_text(encoding='utf-8')
    names = {}
    for block in re.findall('```python\n(.*?)```', page, re.DOTALL):
        exec(compile(block, 'docs/CURVATURE.md', 'exec'), names)  # noqa: S102
    assert 'by differences' in capsys.readouterr().out
    assert names['result'].fun < 0.3
