#!/usr/bin/env python
"""Continue a checkpoint of train_digits.py in PyTorch: same weights, same optimizer state, same batches. MXNet is not needed.

    python examples/train_digits.py --checkpoint-dir run --dropout 0
    python examples/continue_in_pytorch.py run/step-440.safetensors
"""
import argparse
import json
import os
import sys

import digits
import torch
from torch import nn
from tqdm import tqdm

import gluon_optim as go


def build_net(dropout):
    """The net of train_digits.py, layer by layer, so that names differ only where the frameworks' names for layers do."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(dropout),
        nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10))


def carry_over(checkpoint, net):
    """Load the weights of a checkpoint into ``net``, and return its optimizer and scheduler, for PyTorch, with their state."""
    model = go.model_to_torch(checkpoint, like=net)  # for float16 weights, their float32 masters
    net.load_state_dict(model.state_dict())
    states = model.states()
    optimizer = go.torch.create(states.optimizer, net.parameters())
    optimizer.load_state_dict(go.to_torch(states))
    print('\n'.join(model.report + states.report))
    return optimizer, go.torch.scheduler(optimizer, states)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', help='a step-<number>.safetensors')
    parser.add_argument('--log', help='append step and loss here, one JSON object per line')
    options = parser.parse_args(arguments)

    _, run = digits.read_checkpoint(parser, options.checkpoint, 'dropout')
    recipe = run.extra
    torch.manual_seed(recipe['seed'])
    net = build_net(recipe['dropout'])
    optimizer, scheduler = carry_over(options.checkpoint, net)
    (images, labels), (test_images, test_labels) = digits.load()
    steps = recipe['epochs'] * (len(images) // recipe['batch_size'])

    with open(options.log or os.devnull, 'a', buffering=1) as log:
        for step in tqdm(range(run.step, steps), 'training in PyTorch', initial=run.step, total=steps, disable=None):
            batch = digits.batch_indices(recipe['seed'], step, len(images), recipe['batch_size'])
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(torch.from_numpy(images[batch])), torch.from_numpy(labels[batch]).long())
            loss.backward()
            optimizer.step()
            scheduler.step()
            log.write(json.dumps({'step': step + 1, 'loss': loss.item()}) + '\n')

    net.eval()
    with torch.no_grad():
        right = net(torch.from_numpy(test_images)).argmax(1).numpy() == test_labels
    print(f'step {steps} in PyTorch: accuracy {right.mean():.2%} on {len(right)} held-out digits')
    return 0


if __name__ == '__main__':
    sys.exit(main())
