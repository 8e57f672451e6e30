"""Record what real optimizers do where no recording existed: torch in float64 and MXNet 2.0's fused AdaBelief and LANS.

    python record.py torch [CLASS]      with PyTorch installed
    python record.py mxnet [CLASS]      with MXNet 2.0 (mxnet==2.0.0b1, Python 3.8)

writes ``<peer>-<class>-<label>-<case>.npz`` and its entry in ``index.json``. No number is computed here: the peer's own
class makes every step.
"""
import argparse
import hashlib
import json
import os
import sys

import numpy as np

FOLDER = os.path.dirname(os.path.abspath(__file__))
PARAMS = ('p1', 'p2')  # p2 begins with two zero gradients in the cases with z

# class, learning rate, arguments: all away from their defaults and from 0
TORCH = (
    ('SGD', 0.3, {'momentum': 0.8, 'dampening': 0.3, 'weight_decay': 0.07}),
    ('SGD', 0.3, {'momentum': 0.8, 'nesterov': True, 'weight_decay': 0.07}),
    ('Adam', 0.3, {'betas': (0.8, 0.93), 'eps': 0.05, 'weight_decay': 0.07, 'amsgrad': True}),
    ('AdamW', 0.3, {'betas': (0.8, 0.93), 'eps': 0.05, 'weight_decay': 0.07, 'amsgrad': True}),
    ('AdamW', 0.3, {'betas': (0.8, 0.93), 'eps': 0.05, 'weight_decay': 0.07}),
    ('Adamax', 0.3, {'betas': (0.8, 0.93), 'eps': 0.05, 'weight_decay': 0.07}),
    ('NAdam', 0.3, {'betas': (0.8, 0.93), 'eps': 0.05, 'weight_decay': 0.07, 'momentum_decay': 0.3}),
    ('NAdam', 0.3, {'betas': (0.8, 0.93), 'eps': 0.05, 'weight_decay': 0.07, 'momentum_decay': 0.3,
                    'decoupled_weight_decay': True}),
    ('RAdam', 0.3, {'betas': (0.8, 0.93), 'eps': 0.05, 'weight_decay': 0.07}),
    ('RAdam', 0.3, {'betas': (0.8, 0.93), 'eps': 0.05, 'weight_decay': 0.07, 'decoupled_weight_decay': True}),
    ('RMSprop', 0.3, {'alpha': 0.8, 'eps': 0.05, 'weight_decay': 0.07}),
    ('RMSprop', 0.3, {'alpha': 0.8, 'eps': 0.05, 'weight_decay': 0.07, 'momentum': 0.6, 'centered': True}),
    ('Adagrad', 0.3, {'lr_decay': 0.2, 'eps': 0.05, 'weight_decay': 0.07, 'initial_accumulator_value': 0.4}),
    ('Adadelta', 0.3, {'rho': 0.7, 'eps': 0.05, 'weight_decay': 0.07}),
    ('ASGD', 0.3, {'lambd': 0.05, 'alpha': 0.6, 't0': 3.0, 'weight_decay': 0.07}),
    ('Rprop', 0.3, {'etas': (0.6, 1.3), 'step_sizes': (0.2, 0.6)}),
)
MXNET = (
    ('AdaBelief', 0.001, {}),
    ('AdaBelief', 0.3, {'beta1': 0.8, 'beta2': 0.93, 'epsilon': 0.05, 'wd': 0.07}),
    ('AdaBelief', 0.3, {'beta1': 0.8, 'beta2': 0.93, 'epsilon': 0.05, 'wd': 0.3, 'rescale_grad': 0.4, 'clip_gradient': 0.2}),
    ('LANS', 0.3, {'beta1': 0.8, 'beta2': 0.93, 'epsilon': 0.05, 'wd': 0.07, 'lower_bound': 1.2, 'upper_bound': 3.0}),
    ('LANS', 0.3, {'beta1': 0.8, 'beta2': 0.93, 'epsilon': 0.05, 'wd': 0.07, 'rescale_grad': 0.4, 'clip_gradient': 0.1}),
)


def inputs(case, dtype):
    with np.load(os.path.join(FOLDER, 'inputs.npz')) as file:
        factor = file['lr_factor'] if 'sched' in case else np.ones(12)
        gradients = 'gz' if 'z' in case.split('-') else 'g'
        return ({p: file['w0/' + p].astype(dtype) for p in PARAMS}, {p: file[gradients + '/' + p].astype(dtype) for p in PARAMS},
                factor)


def record_torch(cls, lr, hyper, case):
    import torch
    torch.set_default_dtype(torch.float64)  # the scalars it keeps (NAdam's product, ASGD's eta) have the default dtype
    w0, gradients, factor = inputs(case, np.float64)
    params = {p: torch.nn.Parameter(torch.tensor(w)) for p, w in w0.items()}
    optimizer = getattr(torch.optim, cls)(list(params.values()), lr=lr, **hyper)
    recorded = {}
    for t in range(12):
        optimizer.param_groups[0]['lr'] = float(lr * factor[t])
        for p, param in params.items():
            param.grad = torch.tensor(gradients[p][t])
        optimizer.step()
        for p, param in params.items():
            recorded.setdefault('w/' + p, []).append(param.detach().numpy().copy())
            for slot, value in optimizer.state[param].items():
                if slot != 'step' and value is not None:
                    recorded.setdefault(f'state/{p}/{slot}', []).append(np.array(value))
    defaults = {k: v for k, v in optimizer.defaults.items() if k not in hyper and k != 'lr'}
    return recorded, defaults, torch.__version__, 'torch.optim.' + cls


def record_mxnet(cls, lr, hyper, case):
    import mxnet as mx
    w0, gradients, factor = inputs(case, np.float32)
    optimizer = getattr(mx.optimizer, cls)(learning_rate=lr, **hyper)  # 2.0 decays every parameter
    defaults = {k: getattr(optimizer, k) for k in ('beta1', 'beta2', 'epsilon', 'use_fused_step')}
    defaults['wd'] = optimizer.wd
    weights = {p: mx.nd.array(w) for p, w in w0.items()}
    states = {p: optimizer.create_state(i, weights[p]) for i, p in enumerate(PARAMS)}
    recorded = {}
    for t in range(12):
        optimizer.set_learning_rate(float(lr * factor[t]))
        for i, p in enumerate(PARAMS):
            optimizer.update([i], [weights[p]], [mx.nd.array(gradients[p][t])], [states[p]])
            recorded.setdefault('w/' + p, []).append(weights[p].asnumpy())
            for slot, value in zip(('mean', 'var'), states[p]):
                recorded.setdefault(f'state/{p}/{slot}', []).append(value.asnumpy())
    return recorded, {k: v for k, v in defaults.items() if k not in hyper}, mx.__version__, 'mxnet.optimizer.' + cls


def plain(value):
    """What JSON can hold, else its text."""
    if isinstance(value, (tuple, list)):
        return [plain(x) for x in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('peer', choices=('torch', 'mxnet'))
    parser.add_argument('cls', nargs='?', metavar='CLASS', help='only the runs of this class')
    args = parser.parse_args()
    peer = args.peer
    record, runs, name = {'torch': (record_torch, TORCH, 'torch64'), 'mxnet': (record_mxnet, MXNET, 'mxnet20')}[peer]
    if args.cls and args.cls not in {cls for cls, _, _ in runs}:
        parser.error(f'CLASS must be one of the runs declared above. Received: {args.cls}. Add a line for it.')
    with open(os.path.join(FOLDER, 'index.json')) as file:
        index = json.load(file)
    seen = {}
    for cls, lr, hyper in runs:
        number = seen[cls] = seen.get(cls, 0) + 1
        case = 'base' if not hyper else 'sched' if cls == 'LANS' else 'z-sched'  # 2.0's LANS turns NaN on a zero gradient
        if args.cls not in (None, cls):
            continue
        label = f'off-default-{number}' if hyper else 'default'
        arrays, defaults, version, source = record(cls, lr, hyper, case)
        stem = '-'.join((name, cls.lower(), label, case))
        path = os.path.join(FOLDER, stem + '.npz')
        np.savez_compressed(path, **{key: np.stack(values) for key, values in arrays.items()})
        slots = sorted({key.split('/')[2] for key in arrays if key.startswith('state/')})
        with open(path, 'rb') as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        entry = {'file': stem, 'peer': name, 'version': version, 'class': cls, 'source': source, 'label': label,
                 'hyper': {k: plain(v) for k, v in hyper.items()}, 'defaults': {k: plain(v) for k, v in defaults.items()}, 'lr': lr,
                 'case': case, 'params': list(PARAMS), 'slots': dict.fromkeys(slots, ''),
                 'note': 'recorded by record.py', 'sha256': digest}
        index['runs'] = [x for x in index['runs'] if x['file'] != stem] + [entry]
        sys.stdout.write(stem + '\n')
    with open(os.path.join(FOLDER, 'index.json'), 'w') as file:
        json.dump(index, file, indent=1)
        file.write('\n')


if __name__ == '__main__':
    main()
