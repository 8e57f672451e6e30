#!/usr/bin/env python
"""Finish in PyTorch the ResNet-18 that train_resnet.py half trained in Gluon. MXNet is not needed.

    python examples/train_resnet.py --checkpoint-dir resnet
    python examples/finish_resnet_in_pytorch.py resnet/step-44.safetensors --save finished.pt

The net is torchvision's ResNet-18. Its parameters have different names from Gluon's, so they are matched in order.
"""
import argparse
import sys

import digits
import torch
from torch import nn
from tqdm import tqdm

import gluon_optim as go


class Block(nn.Module):
    """Two convolutions and a shortcut, with torchvision's names."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None if stride == 1 else nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet18(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(Block(64, 64, 1), Block(64, 64, 1))
        self.layer2 = nn.Sequential(Block(64, 128, 2), Block(128, 128, 1))
        self.layer3 = nn.Sequential(Block(128, 256, 2), Block(256, 256, 1))
        self.layer4 = nn.Sequential(Block(256, 512, 2), Block(512, 512, 1))
        self.fc = nn.Linear(512, classes)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, padding=1)
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))


def carry_over(checkpoint):
    """The net, the optimizer and the scheduler of a checkpoint, in PyTorch."""
    net = ResNet18(classes=10)
    model = go.model_to_torch(checkpoint, like=net)
    net.load_state_dict(model.state_dict())
    states = model.states()
    optimizer = go.torch.create(states.optimizer, net.parameters())
    optimizer.load_state_dict(go.to_torch(states))
    print('\n'.join(model.report + states.report))
    return net, optimizer, go.torch.scheduler(optimizer, states)


def train(net, optimizer, scheduler, start, recipe, images, labels):
    """The rest of the run, step by step as train_resnet.py would have continued: step -> loss."""
    steps, losses = recipe['epochs'] * (len(images) // recipe['batch_size']), {}
    for step in tqdm(range(start, steps), 'finishing in PyTorch', initial=start, total=steps, disable=None):
        batch = digits.batch_indices(recipe['seed'], step, len(images), recipe['batch_size'])
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(torch.from_numpy(digits.photographs(images[batch]))),
                                           torch.from_numpy(labels[batch]).long())
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses[step + 1] = loss.item()
    return losses


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', help='a step-<number>.safetensors of train_resnet.py')
    parser.add_argument('--save', metavar='FILE', help="write the finished net's state_dict here")
    options = parser.parse_args(arguments)

    _, run = digits.read_checkpoint(parser, options.checkpoint, 'net')
    (images, labels), (test_images, test_labels) = digits.load()
    try:
        net, optimizer, scheduler = carry_over(options.checkpoint)
    except ValueError as error:  # for example, an optimizer without a counterpart in PyTorch
        parser.error(str(error))
    losses = train(net, optimizer, scheduler, run.step, run.extra, images, labels)
    digits.compare(losses, digits.logged(options.checkpoint), 'PyTorch')
    net.eval()
    with torch.no_grad():
        right = net(torch.from_numpy(digits.photographs(test_images))).argmax(1).numpy() == test_labels
    print(f'PyTorch: accuracy {right.mean():.2%} on held-out digits')
    if options.save:
        torch.save(net.state_dict(), options.save)
    return 0


if __name__ == '__main__':
    sys.exit(main())
