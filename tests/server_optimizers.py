"""Optimizers of other people, for servers, which import this module inside `import mxnet`: submodules only."""
from mxnet import ndarray as nd
from mxnet.optimizer.optimizer import Optimizer, register


@register
class Following(Optimizer):
    """Keeps a sum of gradients in a nested state, and counts by an attribute."""

    def create_state(self, index, weight):
        return {'sum': nd.zeros(weight.shape, weight.context, dtype=weight.dtype), 'seen': [nd.zeros((1,))]}

    def update(self, index, weight, grad, state):
        self._update_count(index)
        state['sum'] += grad * self.rescale_grad
        state['seen'][0] += 1
        weight -= self._get_lr(index) * state['sum'] / state['seen'][0].asscalar()
