#!/usr/bin/env python
"""Continue a checkpoint of train_digits.py with its optimizer as an ONNX model: 20 updates on ONNX Runtime. MXNet is not needed.

    python examples/train_digits.py --checkpoint-dir run --dropout 0
    python examples/onnx_train.py run/step-440.safetensors

The model holds weights and optimizer state, and takes gradients; here they come from the net of `continue_in_pytorch.py`.
"""
import argparse
import math
import sys

import digits
import numpy
import onnxruntime
import torch
from continue_in_pytorch import build_net
from torch import nn

import gluon_optim as go

UPDATES = 20


class OnnxOptimizer:
    """The optimizer of a checkpoint on ONNX Runtime. ``arrays`` are weights and state, by the names of the model."""

    def __init__(self, states, weights):
        model = go.to_onnx(states, weights=weights)  # weights and state, and the update as the model's training_info
        step, self.arrays = go.onnx.unpack(model)    # the update as a model that ONNX Runtime takes, and its arrays
        self.session = onnxruntime.InferenceSession(step.SerializeToString(), providers=['CPUExecutionProvider'])
        self.outputs = [output.name for output in self.session.get_outputs()]

    def step(self, gradients, learning_rate):
        """One update; outputs are called as the arrays that they replace, and /new."""
        inputs = {f'{name}/grad': gradient for name, gradient in gradients.items()}
        new = self.session.run(None, {**self.arrays, **inputs, 'learning_rate': numpy.array(learning_rate)})
        self.arrays = {name[:-len('/new')]: array for name, array in zip(self.outputs, new)}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', help='a step-<number>.safetensors')
    options = parser.parse_args(arguments)

    _, run = digits.read_checkpoint(parser, options.checkpoint, 'dropout')
    recipe = run.extra
    net = build_net(recipe['dropout'])
    model = go.model_to_torch(options.checkpoint, like=net)  # of float16 weights their float32 masters
    net.load_state_dict(model.state_dict())
    states = model.states()                                  # under PyTorch's names
    in_onnx = OnnxOptimizer(states, model.weights)
    in_torch = go.torch.create(states.optimizer, net.parameters())  # the same in PyTorch, to compare with
    in_torch.load_state_dict(go.to_torch(states))

    (images, labels), _ = digits.load()
    steps = recipe['epochs'] * (len(images) // recipe['batch_size'])
    params, travelled = dict(net.named_parameters()), dict.fromkeys(states.names, 0.0)
    for step in range(run.step, run.step + UPDATES):
        batch = digits.batch_indices(recipe['seed'], step, len(images), recipe['batch_size'])
        rate = recipe['learning_rate'] * (1 + math.cos(math.pi * min(step + 1, steps) / steps)) / 2
        net.zero_grad()
        loss = nn.functional.cross_entropy(net(torch.from_numpy(images[batch])), torch.from_numpy(labels[batch]).long())
        loss.backward()
        print(f'update {step + 1}: loss {loss.item():.4f}')
        in_onnx.step({name: param.grad.numpy() for name, param in params.items()}, rate)

        before = {name: param.detach().clone() for name, param in params.items()}
        in_torch.param_groups[0]['lr'] = rate
        in_torch.step()
        for name, param in params.items():
            travelled[name] += (param.detach() - before[name]).abs().max().item()

    apart = max(numpy.abs(param.detach().numpy() - in_onnx.arrays[name]).max() / travelled[name] for name, param in params.items())
    print(f'after {UPDATES} updates ONNX Runtime and PyTorch differ by {apart:.1e} of the sum of updates')
    return 0


if __name__ == '__main__':
    sys.exit(main())
