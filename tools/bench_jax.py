"""The competitors of tools/bench.py in JAX: our optimizers as transformations of gradients, and those of optax."""
import functools

import numpy
from bench_competitors import DECAY, NOVOGRAD_BETAS, RATE, Competitor, Framework, arguments_of, slots_of


def compiled(transformation, data, slots, dtype='float32'):
    """A Competitor: one compiled function, which gets weights and state as a gift and so updates them in place where JAX can."""
    import jax
    import optax
    weights = [jax.numpy.array(weight, dtype) for weight in data.weights()]
    gradients = [jax.numpy.array(gradient, dtype) for gradient in data.gradients()]
    now = [weights, jax.jit(transformation.init)(weights)]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(weights, state, gradients):
        updates, state = transformation.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state

    def step():
        now[:] = jax.block_until_ready(update(*now, gradients))
    return Competitor(step, lambda: numpy.array(now[0][0].astype('float32')), slots, dtype)


def ours(name, data, dtype):
    from gluon_optim.optax import create
    return compiled(create(name, **arguments_of(name)), data, slots_of(name), dtype)


def own(create, slots):
    """``create(optax)`` returns a transformation of optax, which is measured in float32."""
    def make(data, dtype):
        import optax
        return compiled(create(optax), data, slots)
    return make


FRAMEWORK = Framework(
    needs=('jax', 'optax'), dtypes=('float32', 'float16', 'bfloat16'), cases=('resnet50', '200'),
    ours={'gluon_optim.optax': ours},
    others={'optax:novograd': own(lambda optax: optax.novograd(RATE, *NOVOGRAD_BETAS, weight_decay=DECAY), 1),
            'optax:adamw': own(lambda optax: optax.adamw(RATE), 2),
            'optax:lamb': own(lambda optax: optax.lamb(RATE), 2),
            'optax:sgd': own(lambda optax: optax.sgd(RATE, momentum=0.9), 1)},
    beside=('optax:*', 'torch_fused:adamw'))
