"""The competitors of tools/bench.py in MXNet: our optimizers and its own, each through a Trainer and through its Updater."""
from bench_competitors import Competitor, Framework, arguments_of

NAMES = ('adam', 'sgd', 'lamb', 'nadam', 'adamax', 'ftml', 'adagrad', 'adadelta', 'rmsprop', 'nag', 'signum', 'ftrl', 'lars')


def ours(name, data, dtype):
    import gluon_optim as go
    return routes(go.create(name, multi_precision=dtype == 'float16', **arguments_of(name)), data, dtype)


def own(name):
    """MXNet's own optimizer of that name."""
    def make(data, dtype):
        import mxnet as mx
        return routes(mx.optimizer.create(name, multi_precision=dtype == 'float16', **arguments_of(name)), data, dtype)
    return make


def nothing(data, dtype):
    """An optimizer that updates nothing: what is left is the cost of MXNet's own lists."""
    import mxnet as mx

    class Nothing(mx.optimizer.Optimizer):
        def __init__(self):
            super().__init__()
            self.aggregate_num = 2 ** 31 - 1

        def create_state_multi_precision(self, index, weight):
            return ()

        def update_multi_precision(self, index, weight, grad, state):
            pass

    return routes(Nothing(), data, dtype)


def routes(optimizer, data, dtype):
    """{route: Competitor} of one optimizer, on the same parameters."""
    import mxnet as mx
    from mxnet import gluon

    parameters = []
    for i, (weight, gradient) in enumerate(zip(data.weights(), data.gradients())):
        parameter = gluon.Parameter(f'parameter{i}', shape=weight.shape, dtype=dtype)
        parameter.initialize(mx.init.Zero())
        parameter.set_data(mx.nd.array(weight, dtype=dtype))
        parameter.grad()[:] = mx.nd.array(gradient, dtype=dtype)
        parameters.append(parameter)
    trainer = gluon.Trainer(parameters, optimizer)
    mark_fresh(parameters)
    trainer.update(1)
    mx.nd.waitall()
    updater = trainer._updaters[0]
    lists = list(range(len(parameters))), [p.grad() for p in parameters], [p.data() for p in parameters]

    def by_trainer():
        trainer.update(1)
        mx.nd.waitall()

    def by_updater():
        updater(*lists)
        mx.nd.waitall()

    slots = None if type(optimizer).__name__ == 'Nothing' else count_slots(updater.states[0], parameters[0].shape, dtype)
    first = lambda: parameters[0].data().asnumpy()  # noqa: E731
    return {'Trainer': Competitor(by_trainer, first, slots, dtype, lambda: mark_fresh(parameters)),
            'Updater': Competitor(by_updater, first, slots, dtype)}


def mark_fresh(parameters):
    """Mark the gradients as fresh, as a backward pass does: `Trainer.update` refuses stale ones."""
    for parameter in parameters:
        for data in parameter.list_data():
            data._fresh_grad = True


def count_slots(state, shape, dtype):
    """The number of arrays of the weight's size in a state, not counting its master."""
    arrays, pending = 0, [state]
    while pending:
        one = pending.pop()
        if isinstance(one, (tuple, list)):
            pending.extend(one)
        elif one is not None:
            arrays += one.shape == shape
    return max(arrays - (dtype == 'float16'), 0)


FRAMEWORK = Framework(
    needs=('mxnet',), dtypes=('float32', 'float16'), cases=('resnet50', '2000', 'layouts'),
    ours={'gluon_optim': ours},
    others={'mxnet:nothing': nothing, **{f'mxnet:{name}': own(name) for name in NAMES}},
    beside=('mxnet:nothing', 'mxnet:adam', 'mxnet:sgd', 'mxnet:lamb', 'mxnet:nadam', 'torch_fused:*', 'torch_optimizer:*',
            'pytorch_optimizer:*', 'timm:*', 'optax:novograd'))
