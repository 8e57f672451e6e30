#!/usr/bin/env python
"""Continue train_resnet.py's checkpoint for 20 updates with the optimizer as an ONNX model. MXNet is not needed.

    python examples/train_resnet.py --checkpoint-dir resnet
    python examples/onnx_train.py resnet/step-44.safetensors --save trained.onnx

ONNX Runtime holds weights and optimizer state and does the updates; the gradients come from PyTorch, from the net defined in
`finish_resnet_in_pytorch.py`. For comparison, the optimizer's mirror in PyTorch gets the same gradients.
"""
import argparse
import sys

import digits
import numpy
import onnx
import onnxruntime
import torch
from finish_resnet_in_pytorch import ResNet18
from onnx import numpy_helper
from torch import nn
from tqdm import tqdm

import gluon_optim as go

UPDATES = 20


class OnnxOptimizer:
    """The optimizer of a checkpoint on ONNX Runtime. ``arrays`` holds weights and state under the model's names."""

    def __init__(self, states, weights):
        self.model = go.to_onnx(states, weights=weights)    # weights and state, and the update as the model's training_info
        step, self.arrays = go.onnx.unpack(self.model)      # the update as a model that ONNX Runtime can run, and its arrays
        self.session, self.schedule = (
            onnxruntime.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
            for model in (step, go.onnx.export_schedule(self.model)))
        self.outputs = [output.name for output in self.session.get_outputs()]

    def step(self, gradients):
        """One update; outputs have the names of the arrays that they replace, plus /new. Returns the learning rate."""
        inputs = {f'{name}/grad': gradient for name, gradient in gradients.items()}
        learning_rate, = self.schedule.run(None, {'t': self.arrays['t']})
        new = self.session.run(None, {**self.arrays, **inputs, 'learning_rate': learning_rate})
        self.arrays = {name[:-len('/new')]: array for name, array in zip(self.outputs, new)}
        return float(learning_rate)

    def save(self, path):
        """Write the model with the current weights and state: `gluon-optim convert` takes them back to MXNet."""
        for graph in (self.model.graph, self.model.training_info[0].algorithm):
            for tensor in graph.initializer:
                tensor.CopyFrom(numpy_helper.from_array(self.arrays[tensor.name], tensor.name))
        onnx.save(self.model, path)


class Mirror:
    """The same optimizer in PyTorch, on separate weights, to measure how far ONNX Runtime is from it."""

    def __init__(self, states, weights):
        self.weights = {name: torch.tensor(weights[name]) for name in states.names}
        self.optimizer = go.torch.create(states.optimizer, self.weights.values())
        self.optimizer.load_state_dict(go.to_torch(states))
        self.travelled = dict.fromkeys(self.weights, 0.0)  # the sum of updates, taking the largest element of each

    def step(self, gradients, learning_rate):
        before = {name: weight.clone() for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            weight.grad = torch.from_numpy(gradients[name])
        self.optimizer.param_groups[0]['lr'] = learning_rate
        self.optimizer.step()
        for name, weight in self.weights.items():
            self.travelled[name] += (weight - before[name]).abs().max().item()

    def compare(self, arrays):
        """Print by how much ``arrays`` differ from the weights here. A weight cannot represent changes smaller than the spacing
        of numbers of its size: rounded the other way once, it is off by that much."""
        names = [name for name, weight in self.weights.items() if (weight.numpy() != arrays[name]).any()]
        print(f'ONNX Runtime and PyTorch agree bit for bit in {len(self.weights) - len(names)} of {len(self.weights)} tensors')
        apart = {name: numpy.abs(self.weights[name].numpy() - arrays[name]).max() for name in names}
        for name in sorted(names, key=lambda name: apart[name] / self.travelled[name], reverse=True)[:1]:
            spacing = numpy.spacing(self.weights[name].abs().max().numpy())
            print(f'{name} differs most: by {apart[name] / self.travelled[name]:.1e} of the sum of its updates, which is '
                  f'{apart[name] / spacing:.1f} of the spacing of float32 numbers at its largest weight')


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', help='a step-<number>.safetensors of train_resnet.py')
    parser.add_argument('--save', metavar='FILE', help='write weights and state after the last update here, as an ONNX model')
    options = parser.parse_args(arguments)

    _, run = digits.read_checkpoint(parser, options.checkpoint, 'net')
    recipe, (images, labels) = run.extra, digits.load()[0]
    steps = recipe['epochs'] * (len(images) // recipe['batch_size'])
    if run.step + UPDATES > steps:
        parser.error(f'{options.checkpoint} is at step {run.step} of {steps}: fewer than {UPDATES} updates are left. '
                     'Pass an earlier one.')
    net = ResNet18(classes=10)
    try:
        model = go.model_to_torch(options.checkpoint, like=net)
        net.load_state_dict(model.state_dict())
        states = model.states()                             # under PyTorch's names
        optimizer, mirror = OnnxOptimizer(states, model.weights), Mirror(states, model.weights)
    except ValueError as error:                             # for example, an optimizer without a counterpart there
        parser.error(str(error))

    params, losses = dict(net.named_parameters()), {}
    for step in tqdm(range(run.step, run.step + UPDATES), 'training on ONNX Runtime', disable=None):
        batch = digits.batch_indices(recipe['seed'], step, len(images), recipe['batch_size'])
        net.zero_grad()
        loss = nn.functional.cross_entropy(net(torch.from_numpy(digits.photographs(images[batch]))),
                                           torch.from_numpy(labels[batch]).long())
        loss.backward()
        losses[step + 1] = loss.item()

        gradients = {name: param.grad.numpy() for name, param in params.items()}
        mirror.step(gradients, optimizer.step(gradients))
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(torch.from_numpy(optimizer.arrays[name]))

    gluon = digits.logged(options.checkpoint)
    for step, loss in losses.items():
        print(f'update {step}: loss {loss:.6f}' + (f', in Gluon {gluon[step]:.6f}' if step in gluon else ''))
    digits.compare(losses, gluon, 'ONNX Runtime')
    mirror.compare(optimizer.arrays)
    if options.save:
        optimizer.save(options.save)
    return 0


if __name__ == '__main__':
    sys.exit(main())
