"""The recorded trajectories of ``golden/``, each under the optimizer and hyper-parameters of ours that claim to equal it.

What was passed to the peer, and the peer's own defaults for the rest, are read from ``golden/index.json`` and translated
by `WORDS`; `CLAIMS` says which optimizer of ours that is. Nothing here imports the package.
"""
import json
import os
from collections import namedtuple

import numpy as np

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'golden')
STEPS = 12

Run = namedtuple('Run', 'id name hypers w0 gradients learning_rates weights slots')
Run.__doc__ = """One recorded run and the optimizer of ours that claims to equal it.

``id``, ``name``, ``hypers``
    The file's name; our name and hyper-parameters (without learning_rate).
``w0[param]``, ``gradients[param]``, ``learning_rates``
    What went in: weight, one gradient and one learning rate per update.
``weights[param]``, ``slots[letter][param]``
    What came out after each update (first axis), slots under the reference's letters and in its units.
"""

# A peer's word for a hyper-parameter -> ours. A tuple takes the elements of a pair.
WORDS = {
    'betas': ('beta1', 'beta2'), 'b1': 'beta1', 'b2': 'beta2', 'beta_1': 'beta1', 'beta_2': 'beta2', 'beta1': 'beta1',
    'beta2': 'beta2', 'eps': 'epsilon', 'epsilon': 'epsilon', 'eps_root': 'epsilon_root', 'weight_decay': 'wd', 'wd': 'wd',
    'amsgrad': 'amsgrad',
    'grad_averaging': 'grad_averaging', 'decoupled_decay': 'decoupled_wd', 'weight_decouple': 'decoupled_wd',
    'decoupled_weight_decay': 'decoupled_wd', 'momentum': 'momentum', 'dampening': 'dampening', 'nesterov': 'nesterov',
    'momentum_decay': 'momentum_decay', 'rho': 'rho', 'centered': 'centered', 'lr_decay': 'lr_decay',
    'initial_accumulator_value': 'initial_accumulator', 'lambd': 'lambd', 'alpha': 'alpha', 't0': 't0',
    'etas': ('eta_minus', 'eta_plus'), 'step_sizes': ('step_min', 'step_max'), 'trust_coefficient': 'trust_coefficient',
    'trust_coeff': 'trust_coefficient', 'eta': 'trust_coefficient', 'clip': 'clip', 'trust_clip': 'clip',
    'lower_bound': 'lower_bound', 'upper_bound': 'upper_bound', 'rescale_grad': 'rescale_grad', 'clip_gradient': 'clip_gradient'}

# A peer's word for a slot -> the reference's letter. `Claim.slots` overrides.
LETTERS = {
    'exp_avg': 'm', '0.mu': 'm', 'moments': 'm', 'mean': 'm', 'm': 'm', 'momentum': 'm',
    'exp_avg_sq': 'v', '0.nu': 'v', 'grads_ema': 'v', 'var': 'v', 'v': 'v', 'max_exp_avg_sq': 'v_max', 'exp_avg_var': 's',
    'exp_inf': 'u', 'mu_product': 'mu_product', 'momentum_buffer': 'b', '0.trace': 'b', 'square_avg': 'n', 'grad_avg': 'g_bar',
    'sum': 'G', '0.sum_of_squares': 'G', 'ax': 'a', 'eta': 'eta', 'mu': 'mu', 'prev': 'g', 'step_size': 'size'}

# Peers that hold their hyper-parameters in single precision: 1 - 0.999 is then off by 1.3e-5.
SINGLE = ('mxnet20', 'tfa')

Claim = namedtuple('Claim', 'files name takes fixed slots')
Claim.__new__.__defaults__ = ((), {}, {})
Claim.__doc__ = """That these files equal our optimizer ``name``.

``takes``
    Which of our hyper-parameters the peer's arguments give, by our names.
``fixed``
    The others. A function of (peer's arguments, learning rate) where that is how it is.
``slots``
    Letters that differ from `LETTERS`: None where the peer keeps something of another meaning, (letter, factor) where its
    unit differs, the factor a number or a function of the learning rate.
"""

MOMENTS = ('beta1', 'beta2', 'epsilon', 'wd')
NOVOGRAD = MOMENTS + ('grad_averaging', 'amsgrad', 'decoupled_wd')
BASE = ('rescale_grad', 'clip_gradient')
SGD = ('momentum', 'dampening', 'nesterov', 'wd')


def larc_around_sgd(arguments, lr):
    return {'variant': 'apex', 'base': 'sgd_torch', 'base_hypers': base_of(arguments, 'sgd_torch')}


def apex_larc(arguments, lr):
    base = {'torch.optim.SGD': 'sgd_torch', 'torch.optim.Adam': 'adam_torch'}[arguments['base']]
    inner = base_of(arguments['base_hyper'], base)
    return {'variant': 'apex', 'base': base, 'base_hypers': inner, 'wd': arguments['base_hyper'].get('weight_decay', 0.0)}


def openseq2seq_larc(arguments, lr):
    # its own defaults: larc_mode 'clip', min_update and epsilon 1e-7
    given = arguments['larc_params']
    return {'variant': 'openseq2seq', 'base': 'sgd_torch', 'base_hypers': {'momentum': arguments['momentum']}, 'min_update': 1e-7,
            'epsilon': 1e-7, 'trust_coefficient': given['larc_eta'], 'clip': given.get('larc_mode', 'clip') == 'clip'}


def base_of(arguments, base):
    if base == 'adam_torch':  # the recorded runs pass nothing: torch.optim.Adam's defaults
        return {'beta1': 0.9, 'beta2': 0.999, 'epsilon': 1e-8}
    return {'momentum': arguments.get('momentum', 0.0), 'nesterov': arguments.get('nesterov', False)}


def inside(letter):
    """A buffer that holds -lr times ours (MXNet, Keras): equal at a constant rate."""
    return letter, lambda lr: -lr


CLAIMS = (
    # NovoGrad
    Claim('optax-novograd-*', 'novograd', MOMENTS + ('epsilon_root',), {'variant': 'paper'}),
    Claim('pytorch_optimizer-novograd-{beta2-0-base,beta2-05-sched,common-wd-z,common-wd-decoupled-sched,default-base,eps-01-base}',
          'novograd', NOVOGRAD, {'variant': 'paper'}),
    # its fixed_decay is w *= 1 - d: at a constant rate a decoupled decay of d/lr
    Claim('pytorch_optimizer-novograd-common-wd-fixed-base', 'novograd', NOVOGRAD,
          lambda arguments, lr: {'variant': 'paper', 'wd': arguments['weight_decay'] / lr}),
    # it averages from the second step on, like TFA, but lr is outside: equal at a constant rate
    Claim('pytorch_optimizer-novograd-common-{ga-z,wd-ga-base}', 'novograd', MOMENTS + ('grad_averaging',), {'variant': 'tfa'},
          {'moments': ('m', lambda lr: -1 / lr)}),
    Claim('tfa-novograd-{default-base,eps-01-base,common-ga-base,common-ga-z,common-wd-ga-base}', 'novograd',
          MOMENTS + ('grad_averaging',), {'variant': 'tfa'}),
    # the one option of TFA's that our variant refuses; at a constant rate it is the paper's; its v_max is as large as the weight
    Claim('tfa-novograd-common-amsgrad-base', 'novograd', MOMENTS + ('amsgrad',), {'variant': 'paper'},
          {'m': inside('m'), 'vhat': ('v_max', 1.0)}),
    Claim('dle-novograd-*', 'novograd', NOVOGRAD, {'variant': 'jasper'}),
    Claim('monai-novograd-*', 'novograd', NOVOGRAD, {'variant': 'jasper'}),
    Claim('torch_optimizer-novograd-*', 'novograd', NOVOGRAD, {'variant': 'jasper'}),
    Claim('timm-nvnovograd-*', 'novograd', NOVOGRAD, {'variant': 'jasper'}),
    # it reads v and never assigns it: whatever beta2 it was given, it runs with 0, and there is no v to compare
    Claim('openseq2seq-novograd-*', 'novograd', ('beta1', 'epsilon', 'wd', 'grad_averaging'),
          {'variant': 'openseq2seq', 'beta2': 0.0},
          {'nvgrad2_ema0': None, 'nvgrad2_ema1': None, 'nvgrad2_ema2': None, 'nvgrad2_ema3': None}),
    # torch's classics ('torch64': in float64, everything off its default)
    Claim('{torch,torch64,optax}-adamw-*', 'adamw', MOMENTS + ('amsgrad',)),
    Claim('{torch,torch64}-sgd-*', 'sgd_torch', SGD),
    Claim('optax-sgd-momentum-base', 'sgd_torch', SGD),
    Claim('torch_optimizer-lars-default-base', 'sgd_torch', SGD),  # no decay: its LARS is then plain SGD
    Claim('{torch,torch64,optax}-adam-*', 'adam_torch', MOMENTS + ('amsgrad',)),
    Claim('{torch,torch64}-adamax-*', 'adamax_torch', MOMENTS),
    Claim('{torch,torch64}-nadam-*', 'nadam_torch', MOMENTS + ('momentum_decay', 'decoupled_wd')),
    Claim('{torch,torch64}-radam-*', 'radam', MOMENTS + ('decoupled_wd',)),
    Claim('{torch,torch64}-rmsprop-*', 'rmsprop_torch', ('epsilon', 'momentum', 'centered', 'wd'),
          lambda arguments, lr: {'rho': arguments['alpha']}),
    Claim('{torch,torch64}-adagrad-*', 'adagrad_torch', ('lr_decay', 'initial_accumulator', 'epsilon', 'wd')),
    Claim('{torch,torch64}-adadelta-*', 'adadelta_torch', ('rho', 'epsilon', 'wd'), {},
          {'square_avg': 'E_g2', 'acc_delta': 'E_dx2'}),
    Claim('{torch,torch64}-asgd-*', 'asgd', ('lambd', 'alpha', 't0', 'wd')),
    Claim('{torch,torch64}-rprop-*', 'rprop', ('eta_minus', 'eta_plus', 'step_min', 'step_max')),
    # MXNet 2.0's fused steps
    Claim('mxnet20-lans-{common-base,common-sched,off-default-*}', 'lans', MOMENTS + BASE + ('lower_bound', 'upper_bound')),
    Claim('mxnet20-adabelief-off-default-*', 'adabelief', MOMENTS + BASE, {}, {'var': 's'}),
    # its kernel takes b2 (s - x) + x for b2 s + (1 - b2) x: with beta2 = 0.999 s has only four digits
    Claim('mxnet20-adabelief-default-base', 'adabelief', MOMENTS, {}, {'var': None}),
    # epsilon stands elsewhere in these formulas and is too small to be seen here; all else is compared
    Claim('{optax,pytorch_optimizer,torch_optimizer}-adabelief-default-base', 'adabelief', MOMENTS, {},
          {'0.nu': 's', 'rho_inf': None}),
    Claim('optax-radam-default-base', 'radam', MOMENTS),
    Claim('optax-adagrad-default-base', 'adagrad_torch', ('initial_accumulator', 'epsilon'), {'lr_decay': 0.0}),
    # LARC, and LARS where it is LARC's scale mode
    Claim('apex-larc-*', 'larc', ('trust_coefficient', 'clip', 'epsilon'), apex_larc),
    Claim('openseq2seq-larc-*', 'larc', (), openseq2seq_larc, {'momentum': 'b'}),
    Claim('timm-lars-{wd-base,wd-sched,wd-clip-base,common-sched,always-base,always-z}', 'larc',
          ('trust_coefficient', 'clip', 'epsilon', 'wd'), larc_around_sgd),
    Claim('torch_optimizer-lars-common-base', 'larc', ('trust_coefficient', 'epsilon', 'wd'),
          lambda arguments, lr: dict(larc_around_sgd(arguments, lr), clip=False)),
    # lr inside the momentum: equal at a constant rate
    Claim('mxnet19-lars-*', 'larc', ('trust_coefficient', 'epsilon', 'wd'),
          lambda arguments, lr: dict(larc_around_sgd(arguments, lr), clip=False), {'mom': inside('b')}),
    Claim('mxnet20-lars-common-base', 'larc', ('trust_coefficient', 'epsilon', 'wd'),
          lambda arguments, lr: dict(larc_around_sgd(arguments, lr), clip=False), {'mom': inside('b')}),
    # its norm is of the decayed gradient: equal without decay
    Claim('optax-lars-default-base', 'larc', ('trust_coefficient', 'epsilon', 'wd'),
          lambda arguments, lr: dict(larc_around_sgd(arguments, lr), clip=False), {'3.trace': inside('b')}),
)


def index():
    with open(os.path.join(FOLDER, 'index.json')) as file:
        return json.load(file)


def matches(pattern, name):
    """Whether ``name`` fits ``pattern``: ``*`` at the end, ``{one,other}`` anywhere.

    >>> matches('{torch,optax}-adam-*', 'optax-adam-default-base')
    True
    """
    if '{' in pattern:
        before, rest = pattern.split('{', 1)
        choices, after = rest.split('}', 1)
        return any(matches(before + choice + after, name) for choice in choices.split(','))
    return name.startswith(pattern[:-1]) if pattern.endswith('*') else name == pattern


def claim_of(file):
    """The claim about a recorded file; exactly one must match."""
    found = [claim for claim in CLAIMS if matches(claim.files, file)]
    if len(found) != 1:
        raise LookupError(f'{len(found)} claims match the recorded run {file}')
    return found[0]


def hypers_of(claim, entry):
    """Our hyper-parameters for what the peer was given."""
    arguments = dict(entry.get('defaults') or {}, **entry['hyper'])
    ours = {}
    for word, value in arguments.items():
        names = WORDS.get(word, ())
        pairs = [(names, value)] if isinstance(names, str) else zip(names, value if names else ())
        ours.update((name, value) for name, value in pairs if name in claim.takes)
    ours.update(claim.fixed(arguments, entry['lr']) if callable(claim.fixed) else claim.fixed)
    if entry['peer'] in SINGLE:
        ours = {name: float(np.float32(value)) if isinstance(value, float) else value for name, value in ours.items()}
    return ours


def load(entry, inputs):
    claim = claim_of(entry['file'])
    with np.load(os.path.join(FOLDER, entry['file'] + '.npz')) as recorded:
        arrays = {key: recorded[key] for key in recorded.files}
    params = entry['params']
    case = entry['case'].split('-')  # base, z, sched or z-sched
    gradients = 'gz' if 'z' in case else 'g'
    factor = inputs['lr_factor'] if 'sched' in case else np.ones(STEPS)
    slots = {}
    for word in entry['slots']:
        meaning = claim.slots.get(word, LETTERS.get(word))
        if word in claim.slots and meaning is None:
            continue
        letter, unit = (meaning, 1.0) if isinstance(meaning, str) else meaning
        unit = unit(entry['lr']) if callable(unit) else unit
        slots[letter] = {param: arrays[f'state/{param}/{word}'] / unit for param in params}
    return Run(entry['file'], claim.name, hypers_of(claim, entry), {param: inputs['w0/' + param] for param in params},
               {param: inputs[gradients + '/' + param] for param in params}, entry['lr'] * factor,
               {param: arrays['w/' + param] for param in params}, slots)


def all_runs():
    """Every recorded run that the index lists."""
    with np.load(os.path.join(FOLDER, 'inputs.npz')) as file:
        inputs = {key: file[key] for key in file.files}
    return [load(entry, inputs) for entry in index()['runs']]
