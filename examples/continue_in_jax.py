#!/usr/bin/env python
"""Continue a checkpoint of train_digits.py in JAX: same weights, same optimizer state, same batches. MXNet is not needed.

    python examples/train_digits.py --checkpoint-dir run --dropout 0
    python examples/continue_in_jax.py run/step-440.safetensors
"""
import argparse
import functools
import json
import os
import sys

import digits
import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import gluon_optim as go


def convolution(x, w, b):
    same = jax.lax.conv_general_dilated(x, w, (1, 1), 'SAME', dimension_numbers=('NCHW', 'OIHW', 'NCHW'))
    return same + b[:, None, None]


def batch_norm(x, gamma, beta, mean, var):
    return (x - mean[:, None, None]) * (gamma / jnp.sqrt(var + 1e-5))[:, None, None] + beta[:, None, None]


def forward(params, statistics, images, training):
    """The net of train_digits.py, parameters and running statistics under Gluon's names: scores, and new statistics."""
    w = {name: value.astype(jnp.float32) for name, value in params.items()}  # float16 ones are computed with in float32
    x, new = images, {}
    for layer in (0, 3):
        x = convolution(x, w[f'{layer}.weight'], w[f'{layer}.bias'])
        norm = f'{layer + 1}'
        running = [statistics[f'{norm}.running_{what}'] for what in ('mean', 'var')]
        used = [x.mean((0, 2, 3)), x.var((0, 2, 3))] if training else running
        for what, old, value in zip(('mean', 'var'), running, used):
            new[f'{norm}.running_{what}'] = 0.9 * old + 0.1 * value
        x = jax.nn.relu(batch_norm(x, w[f'{norm}.gamma'], w[f'{norm}.beta'], *used))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), 'VALID')
    x = jax.nn.relu(x.reshape(len(x), -1) @ w['9.weight'].T + w['9.bias'])  # Gluon's Dense has (out, in)
    return x @ w['11.weight'].T + w['11.bias'], new


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', help='a step-<number>.safetensors')
    parser.add_argument('--log', help='append step and loss here, one JSON object per line')
    options = parser.parse_args(arguments)

    states, run = digits.read_checkpoint(parser, options.checkpoint, 'dropout')
    recipe = run.extra
    if recipe['dropout']:
        parser.error(f'the net below has no dropout. The run was trained with {recipe["dropout"]}: train with --dropout 0.')
    arrays = {weight.name: jnp.array(weight.copies[0]) for weight in run.weights}
    params = {name: arrays.pop(name) for name in states.names if states.counts[name]}
    statistics = arrays  # the others, which no gradient moves
    (images, labels), (test_images, test_labels) = digits.load()
    steps = recipe['epochs'] * (len(images) // recipe['batch_size'])

    # the optimizer with its state; a schedule in JAX is a function of the number of updates done
    def schedule(count):
        return recipe['learning_rate'] * (1 + jnp.cos(jnp.pi * (count + 1) / steps)) / 2

    names = {name: name for name in params}
    state = go.to_optax(states, params=names)
    optimizer = go.optax.create(states.optimizer, **dict(go.optax.arguments(states, names), learning_rate=schedule))
    print('\n'.join(states.report))

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))  # the old arrays' memory is used for the new ones
    def train_step(params, state, statistics, images, labels):
        def loss_of(params):
            scores, new = forward(params, statistics, images, training=True)
            return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean(), new
        (loss, statistics), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, statistics, loss

    with open(options.log or os.devnull, 'a', buffering=1) as log:
        for step in tqdm(range(run.step, steps), 'training in JAX', initial=run.step, total=steps, disable=None):
            batch = digits.batch_indices(recipe['seed'], step, len(images), recipe['batch_size'])
            params, state, statistics, loss = train_step(params, state, statistics, images[batch], labels[batch])
            log.write(json.dumps({'step': step + 1, 'loss': float(loss)}) + '\n')

    right = forward(params, statistics, test_images, training=False)[0].argmax(1) == test_labels
    print(f'step {steps} in JAX: accuracy {float(right.mean()):.2%} on {len(right)} held-out digits')
    return 0


if __name__ == '__main__':
    sys.exit(main())
