"""Let a real MXNet 2.0 train, save its states after three updates, and go on: tests/test_mxnet2.py goes on without MXNet.

    python make_continued.py continued.npz

The file holds the ``gradients`` of the following updates, and of each case ``/states`` (the bytes of the .states file),
``/weight`` at that time, and ``/weights`` after each update.
"""
import sys

import mxnet as mx
import numpy as np

MOMENTS = dict(beta1=0.8, beta2=0.9, epsilon=1e-3)
OPTIMIZERS = {
    'sgd': dict(momentum=0.8), 'sgd-plain': {}, 'nag': dict(momentum=0.8), 'signum': dict(momentum=0.8, wd_lh=0.01),
    'adagrad': dict(epsilon=1e-3), 'rmsprop': dict(rho=0.8, epsilon=1e-3),
    'rmsprop-centered': dict(rho=0.8, momentum=0.7, centered=True, epsilon=1e-3),
    'adadelta': dict(rho=0.8, epsilon=1e-3), 'adam': MOMENTS, 'adamax': MOMENTS, 'nadam': MOMENTS,
    'dcasgd': dict(momentum=0.8, lamda=0.1), 'ftrl': dict(lamda1=0.02, beta=0.5), 'ftml': MOMENTS, 'lamb': MOMENTS,
    'lamb-plain': dict(MOMENTS, bias_correction=False), 'lars': dict(momentum=0.8, eta=0.01), 'adamw': MOMENTS,
    'adabelief': MOMENTS, 'lans': MOMENTS,
}
SETTINGS = {'wd+clip': dict(wd=0.05, clip_gradient=1.5), 'wd': dict(wd=0.05), 'clip': dict(clip_gradient=1.5)}
FIRST, ALL = 3, 9


def main(path):
    found = {}
    for case, own in OPTIMIZERS.items():
        for setting, base in SETTINGS.items():
            optimizer = mx.optimizer.create(case.split('-')[0], learning_rate=0.1, rescale_grad=0.5, **base, **own)
            updater = mx.optimizer.get_updater(optimizer)
            random = np.random.default_rng(3)
            weight = mx.nd.array(random.normal(size=(3, 4)), dtype='float32')
            gradients = (random.normal(size=(ALL, 3, 4)) * [1, 1e-2, 3, 0.3]).astype('float32')
            weights = []
            for t, gradient in enumerate(gradients):
                if t == FIRST:
                    states, start = np.frombuffer(updater.get_states(dump_optimizer=True), 'uint8'), weight.asnumpy()
                updater([0], [mx.nd.array(gradient)], [weight])
                weights.append(weight.asnumpy())
            key = '%s/%s/' % (case, setting)
            found.update({key + 'states': states, key + 'weight': start, key + 'weights': np.array(weights[FIRST:])})
    np.savez_compressed(path, version=mx.__version__, gradients=gradients[FIRST:], **found)


if __name__ == '__main__':
    main(sys.argv[1])
