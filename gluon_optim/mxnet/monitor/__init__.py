"""What to look at while a net trains: the noise of its gradients, and norms of weights, gradients and updates.

>>> import gluon_optim as go
>>> import mxnet as mx
>>> net = mx.gluon.nn.Dense(1, in_units=2)
>>> net.initialize(mx.init.One(), ctx=[mx.cpu(0), mx.cpu(1)])
>>> trainer = mx.gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.5})
>>> noise, norms = go.monitor.NoiseScale(trainer, net), go.monitor.Norms(trainer, net, params='weight')
>>> for x in (1, 2, 3):
...     with mx.autograd.record():
...         losses = [net(mx.nd.full((4, 2), x + k, ctx=mx.cpu(k))).sum() for k in (0, 1)]
...     mx.autograd.backward(losses)
...     noise.observe(batch_size=8)
...     with norms:
...         trainer.step(batch_size=8)
>>> noise
<NoiseScale after 3 batches: B* = 4.46512, eta* = 0.5, eta_1 = 0.111979>
>>> norms.table()
Norms at update 3
  parameter  weight_norm  gradient_norm  update_norm  update_ratio
  weight         1.41421        4.94975      2.47487          1.75
"""
from .noise import Noise, NoiseScale
from .norms import Norm, Norms

__all__ = ['Noise', 'NoiseScale', 'Norm', 'Norms']
