"""What to look at while a net trains: the noise of its gradients, and norms of weights, gradients and updates.

>>> import gluon_optim as go
>>> import mxnet as mx
>>> net = mx.gluon.nn.Dense(1, in_units=2)
>>> net.initialize(mx.init.One())
>>> trainer = mx.gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.5})
>>> norms = go.monitor.Norms(trainer, net)
>>> with mx.autograd.record():
...     loss = net(mx.nd.ones((4, 2))).sum()
>>> loss.backward()
>>> with norms:
...     trainer.step(batch_size=4)
>>> norms.table()
Norms at update 1
  parameter  weight_norm  gradient_norm  update_norm  update_ratio
  weight         1.41421        1.41421     0.707107           0.5
  bias                 0              1          0.5             -
"""
from .noise import Noise, NoiseScale
from .norms import Norm, Norms

__all__ = ['Noise', 'NoiseScale', 'Norm', 'Norms']
