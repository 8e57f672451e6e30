#!/usr/bin/env python
"""Continue a checkpoint of train_digits.py in PyTorch: same weights, same optimizer state, same batches. MXNet is not needed.

    python examples/train_digits.py --checkpoint-dir run --dropout 0
    python examples/continue_in_pytorch.py run/step-440.safetensors
"""
import argparse
import json
import math
import os
import sys

import digits
import torch
from torch import nn
from tqdm import tqdm

import gluon_optim as go
from gluon_optim.states import container


def build_net(dropout):
    """The net of train_digits.py, layer by layer, so that names differ only where the frameworks' words do."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(dropout),
        nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10))


def gluon_name(net, name):
    """Gluon's name for PyTorch's ``name``: batch norm has gamma and beta."""
    layer, kind = name.split('.')
    if isinstance(net[int(layer)], nn.BatchNorm2d):
        kind = {'weight': 'gamma', 'bias': 'beta'}.get(kind, kind)
    return f'{layer}.{kind}'


def load_weights(net, states, run):
    """Copy the weights of a checkpoint into ``net``; of float16 ones their float32 masters."""
    arrays = {**{weight.name: weight.copies[0] for weight in run.weights}, **states.master}
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if not name.endswith('num_batches_tracked'):
                tensor.copy_(torch.from_numpy(arrays[gluon_name(net, name)]))


def load_optimizer(net, states):
    """The optimizer of a checkpoint, for PyTorch, with its state."""
    optimizer = go.torch.create(states.optimizer, net.parameters())
    optimizer.load_state_dict(go.to_torch(states, params=[gluon_name(net, name) for name, _ in net.named_parameters()]))
    print('\n'.join(states.report))
    return optimizer


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', help='a step-<number>.safetensors')
    parser.add_argument('--log', help='append step and loss here, one JSON object per line')
    options = parser.parse_args(arguments)

    states, run = container.read_checkpoint(options.checkpoint)
    recipe = run.extra
    torch.manual_seed(recipe['seed'])
    net = build_net(recipe['dropout'])
    load_weights(net, states, run)
    optimizer = load_optimizer(net, states)
    (images, labels), (test_images, test_labels) = digits.load()
    steps = recipe['epochs'] * (len(images) // recipe['batch_size'])

    with open(options.log or os.devnull, 'a', buffering=1) as log:
        for step in tqdm(range(run.step, steps), 'training in PyTorch', initial=run.step, total=steps, disable=None):
            batch = digits.batch_indices(recipe['seed'], step, len(images), recipe['batch_size'])
            optimizer.param_groups[0]['lr'] = recipe['learning_rate'] * (1 + math.cos(math.pi * (step + 1) / steps)) / 2
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(torch.from_numpy(images[batch])), torch.from_numpy(labels[batch]).long())
            loss.backward()
            optimizer.step()
            log.write(json.dumps({'step': step + 1, 'loss': loss.item()}) + '\n')

    net.eval()
    with torch.no_grad():
        right = net(torch.from_numpy(test_images)).argmax(1).numpy() == test_labels
    print(f'step {steps} in PyTorch: accuracy {right.mean():.2%} on {len(right)} held-out digits')
    return 0


if __name__ == '__main__':
    sys.exit(main())
