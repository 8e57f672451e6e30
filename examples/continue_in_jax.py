#!/usr/bin/env python
"""Finish in JAX the ResNet-18 that train_resnet.py half trained in Gluon. Neither MXNet nor PyTorch is needed.

    python examples/train_resnet.py --checkpoint-dir resnet
    python examples/continue_in_jax.py resnet/step-44.safetensors --save finished.npz

Weights, running statistics and optimizer state keep Gluon's names and shapes; they are NumPy arrays before they are JAX's.
"""
import argparse
import functools
import sys

import digits
import jax
import jax.numpy as jnp
import numpy
import optax
from tqdm import tqdm

import gluon_optim as go


def convolution(x, w, stride=1):
    """Convolve images (batch, channels, height, width) with a weight (outputs, inputs, height, width), padded by half of it."""
    padding, layout = w.shape[2] // 2, ('NCHW', 'OIHW', 'NCHW')
    return jax.lax.conv_general_dilated(x, w, (stride, stride), [(padding, padding)] * 2, dimension_numbers=layout)


def max_pool(x):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 3, 3), (1, 1, 2, 2), ((0, 0), (0, 0), (1, 1), (1, 1)))


def forward(params, statistics, images, training):
    """resnet18_v1 from Gluon's model zoo, all arrays under Gluon's names: returns scores and new running statistics."""
    new = dict(statistics)

    def conv(x, name, stride=1):
        return convolution(x, params[name + '.weight'], stride)

    def batch_norm(x, name):
        mean, var = running = [statistics[f'{name}.running_{what}'] for what in ('mean', 'var')]
        if training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))  # MXNet adds this variance itself, PyTorch n/(n-1) times it
            new[name + '.running_mean'], new[name + '.running_var'] = (
                0.9 * old + 0.1 * now for old, now in zip(running, (mean, var)))
        scale = params[name + '.gamma'] / jnp.sqrt(var + 1e-5)
        return (x - mean[:, None, None]) * scale[:, None, None] + params[name + '.beta'][:, None, None]

    def block(x, name, stride):
        y = jax.nn.relu(batch_norm(conv(x, name + '.body.0', stride), name + '.body.1'))
        y = batch_norm(conv(y, name + '.body.3'), name + '.body.4')
        if stride > 1:
            x = batch_norm(conv(x, name + '.downsample.0', stride), name + '.downsample.1')
        return jax.nn.relu(x + y)

    x = max_pool(jax.nn.relu(batch_norm(conv(images, 'features.0', 2), 'features.1')))
    for stage in (4, 5, 6, 7):
        x = block(x, f'features.{stage}.0', 1 if stage == 4 else 2)
        x = block(x, f'features.{stage}.1', 1)
    return x.mean((2, 3)) @ params['output.weight'].T + params['output.bias'], new  # Gluon's Dense has (out, in)


def carry_over(states, run):
    """Parameters, running statistics, optimizer and its state of a checkpoint, as JAX has them."""
    arrays = {weight.name: jnp.array(weight.copies[0]) for weight in run.weights}
    params = {name: arrays.pop(name) for name in states.names if states.counts[name]}  # no gradients, no updates

    names = {name: name for name in params}
    state = go.to_optax(states, params=names)
    optimizer = go.optax.create(states.optimizer, **go.optax.arguments(states, names))  # the learning rate is Gluon's schedule
    print('\n'.join(states.report))
    return params, arrays, optimizer, state


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', help='a step-<number>.safetensors of train_resnet.py')
    parser.add_argument('--save', metavar='FILE', help='write the finished parameters and statistics here, as .npz')
    options = parser.parse_args(arguments)

    states, run = digits.read_checkpoint(parser, options.checkpoint, 'net')
    (images, labels), (test_images, test_labels) = digits.load()
    recipe = run.extra
    steps = recipe['epochs'] * (len(images) // recipe['batch_size'])
    try:
        params, statistics, optimizer, state = carry_over(states, run)
    except ValueError as error:  # for example, an optimizer without a counterpart in JAX
        parser.error(str(error))

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))  # the new arrays reuse the memory of the old ones
    def train_step(params, statistics, state, images, labels):
        def loss_of(params):
            scores, new = forward(params, statistics, images, training=True)
            return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean(), new
        (loss, statistics), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), statistics, state, loss

    losses = {}
    for step in tqdm(range(run.step, steps), 'finishing in JAX', initial=run.step, total=steps, disable=None):
        batch = digits.batch_indices(recipe['seed'], step, len(images), recipe['batch_size'])
        params, statistics, state, loss = train_step(params, statistics, state, digits.photographs(images[batch]), labels[batch])
        losses[step + 1] = float(loss)

    digits.compare(losses, digits.logged(options.checkpoint), 'JAX')
    scores, _ = jax.jit(functools.partial(forward, training=False))(params, statistics, digits.photographs(test_images))
    print(f'JAX: accuracy {float((scores.argmax(1) == test_labels).mean()):.2%} on held-out digits')
    if options.save:
        numpy.savez(options.save, **params, **statistics)
    return 0


if __name__ == '__main__':
    sys.exit(main())
