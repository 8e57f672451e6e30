"""MXNet's own optimizers, each declared once: its classes, the state it keeps and its nesting, and what it equals here.

The readers and writers of MXNet's files, and the drop-ins of `gluon_optim.mxnet.builtin`, are derived from these declarations.
"""
from typing import Any, Dict, Mapping, NamedTuple, Tuple, Union

__all__ = ['BUILTINS', 'Builtin', 'Equal', 'Layout', 'MXNetClass', 'classes']

Layout = Union[str, Tuple[str, ...], None]  # a state is one array, a tuple of arrays, or None


class MXNetClass(NamedTuple):
    """The class of one version of MXNet: its attributes that are arguments, with their defaults, and its other attributes."""

    path: str
    arguments: Mapping[str, Any]
    attributes: Mapping[str, Any] = {}  # its own counters, and attributes that differ from their usual values


class Equal(NamedTuple):
    """The rule that computes what one of MXNet 2.x's optimizers does.

    ``slots``   MXNet's name -> the rule's, where they differ
    ``unused``  arguments without effect, with the values they must have
    ``fixed``   arguments of the rule that MXNet 2.x does not have
    """

    rule: str
    slots: Mapping[str, str] = {}
    unused: Mapping[str, Any] = {}
    fixed: Mapping[str, Any] = {}


class Builtin(NamedTuple):
    """One of MXNet's optimizers.

    ``state``        how its slots are nested: a name for a bare array, a tuple of names, or None. A slot that the
                     hyper-parameters do without is None in it.
    ``also``         further layouts, depending on options
    ``state_2``      the layouts of 2.x where they differ
    ``master_last``  whether 1.x puts the float32 master last, ``(state, master)``; 2.x puts it first
    ``classes``      version -> class
    ``variables``    attributes that are state of the optimizer as a whole
    ``arguments``    attribute -> argument, where they have different names
    ``names_2``      2.x's name of an argument -> the name that the rule of the same name has for it, where they differ
    ``older``        arguments of older versions
    ``equal_2``      what 2.x's computes; None if that is the rule of the same name, or none
    """

    state: Layout
    classes: Mapping[int, MXNetClass] = {}
    also: Tuple[Layout, ...] = ()
    state_2: Tuple[Layout, ...] = ()
    master_last: bool = False
    variables: Tuple[str, ...] = ()
    arguments: Mapping[str, str] = {}
    names_2: Mapping[str, str] = {}
    older: Tuple[str, ...] = ()
    equal_2: Union[Equal, None] = None

    def layouts(self, version: int) -> Tuple[Layout, ...]:
        """The layouts of its states in files of that version of MXNet."""
        return self.state_2 if version == 2 and self.state_2 else (self.state, *self.also)

    def is_master_last(self, version: int) -> bool:
        return version == 1 and self.master_last

    def argument_names(self) -> Tuple[Tuple[str, str], ...]:
        """(attribute, argument) of all versions."""
        attributes = dict.fromkeys([name for one in self.classes.values() for name in one.arguments] + list(self.older))
        return tuple((name, self.arguments.get(name, name)) for name in attributes)


def _one(name: str, attributes: Mapping[str, Any] = {}, **arguments: Any) -> MXNetClass:
    return MXNetClass(f'mxnet.optimizer.optimizer.{name}', arguments, attributes)


def _two(path: str, fused: bool = True, together: int = 1, attributes: Mapping[str, Any] = {}, **arguments: Any) -> MXNetClass:
    return MXNetClass(f'mxnet.optimizer.{path}', arguments, {'use_fused_step': fused, 'aggregate_num': together, **attributes})


_ADAM: Dict[str, Any] = dict(beta1=0.9, beta2=0.999, epsilon=1e-8)
_LAMB: Dict[str, Any] = dict(beta1=0.9, beta2=0.999, epsilon=1e-6, lower_bound=None, upper_bound=None)
_MOMENTS = 'mean', 'var'

BUILTINS: Dict[str, Builtin] = {
    'sgd': Builtin('momentum', {
        1: _one('SGD', {'aggregate_num': 4}, momentum=0.0, lazy_update=True),
        2: _two('sgd.SGD', momentum=0.0, lazy_update=False)}, master_last=True),
    'nag': Builtin('momentum', {
        1: _one('NAG', momentum=0.0),
        2: _two('nag.NAG', momentum=0.9)}, master_last=True),
    'signum': Builtin('momentum', {
        1: _one('Signum', momentum=0.9, wd_lh=0.0),
        2: _two('signum.Signum', momentum=0.9, wd_lh=0.0)}),
    'adagrad': Builtin('history', {
        1: _one('AdaGrad', float_stable_eps=1e-7),
        2: _two('adagrad.AdaGrad', epsilon=1e-6)}, arguments={'float_stable_eps': 'eps'}, names_2={'epsilon': 'eps'},
        equal_2=Equal('adagrad_torch', {'history': 'sum_sq'})),
    'rmsprop': Builtin(('n', 'g', 'delta'), {
        1: _one('RMSProp', gamma1=0.9, gamma2=0.9, epsilon=1e-8, centered=False, clip_weights=None),
        2: _two('rmsprop.RMSProp', rho=0.9, momentum=0.9, epsilon=1e-8, centered=False, clip_weights=None)},
        also=(('n',),), state_2=('n', ('g', 'n', 'delta')), names_2={'rho': 'gamma1', 'momentum': 'gamma2'}),
    'adadelta': Builtin(('acc_g', 'acc_delta'), {
        1: _one('AdaDelta', rho=0.9, epsilon=1e-5),
        2: _two('adadelta.AdaDelta', fused=False, rho=0.9, epsilon=1e-6)},
        equal_2=Equal('adadelta_torch', {'acc_g': 'mean_sq', 'acc_delta': 'mean_sq_delta'})),
    'adam': Builtin(_MOMENTS, {
        1: _one('Adam', lazy_update=True, **_ADAM),
        2: _two('adam.Adam', lazy_update=False, **_ADAM)}),
    'adamax': Builtin(_MOMENTS, {
        1: _one('Adamax', beta1=0.9, beta2=0.999),
        2: _two('adamax.Adamax', fused=False, beta1=0.9, beta2=0.999, epsilon=0.0)},  # as 1.x, which has no epsilon
        equal_2=Equal('adamax', unused={'epsilon': 0.0})),
    'nadam': Builtin(_MOMENTS, {
        1: _one('Nadam', {'m_schedule': 1.0}, schedule_decay=0.004, **_ADAM),
        2: _two('nadam.Nadam', fused=False, attributes={'m_schedule': 1.0}, schedule_decay=0.004, **_ADAM)},
        variables=('m_schedule',)),
    'dcasgd': Builtin(('momentum', 'previous_weight'), {
        1: _one('DCASGD', {'weight_previous': {}}, momentum=0.0, lamda=0.04),
        2: _two('dcasgd.DCASGD', fused=False, attributes={'weight_previous': {}}, momentum=0.0, lamda=0.04)}),
    'ftrl': Builtin(('z', 'n'), {
        1: _one('Ftrl', lamda1=0.01, beta=1),
        2: _two('ftrl.Ftrl', lamda1=0.01, beta=1.0)}),
    'ftml': Builtin(('d', 'v', 'z'), {
        1: _one('FTML', beta1=0.6, beta2=0.999, epsilon=1e-8),
        2: _two('ftml.FTML', beta1=0.6, beta2=0.999, epsilon=1e-8)}),
    'sgld': Builtin(None, {
        1: _one('SGLD'),
        2: _two('sgld.SGLD', fused=False)}),
    'lamb': Builtin(_MOMENTS, {
        1: _one('LAMB', {'aggregate_num': 45}, bias_correction=True, **_LAMB),
        2: _two('lamb.LAMB', together=4, bias_correction=True, **_LAMB)}),
    'lars': Builtin('momentum', {
        1: _one('LARS', {'aggregate_num': 4, 'skip': 0, 'last_lr': None, 'cur_lr': None}, momentum=0.0, lazy_update=True,
                eta=0.001, eps=0, momentum_correction=True),
        2: _two('lars.LARS', momentum=0.0, eta=0.001, epsilon=1e-8, lazy_update=False)},
        master_last=True, variables=('last_lr', 'cur_lr'),
        names_2={'epsilon': 'eps'}, equal_2=Equal('lars', fixed={'momentum_correction': False})),
    'lbsgd': Builtin('momentum', {
        1: _one('LBSGD', {'lbmult': 1, 'cumgrads': {}, 'adaptive': False, 'admult': 1}, momentum=0.0,
                warmup_strategy='linear', warmup_epochs=5, batch_scale=1, updates_per_epoch=32, num_epochs=60)},
        variables=('cumgrads',)),
    # only in 2.x
    'adamw': Builtin(_MOMENTS, {2: _two('adamW.AdamW', together=4, correct_bias=True, beta1=0.9, beta2=0.999, epsilon=1e-6)}),
    'adabelief': Builtin(_MOMENTS, {
        2: _two('adabelief.AdaBelief', together=4, correct_bias=True, beta1=0.9, beta2=0.999, epsilon=1e-6)},
        equal_2=Equal('adabelief', unused={'correct_bias': True})),
    'lans': Builtin(_MOMENTS, {2: _two('lans.LANS', together=4, **_LAMB)}),
    # can be read from files, but is otherwise unknown here
    'ccsgd': Builtin('momentum', master_last=True, older=('momentum', 'lazy_update')),
    'groupadagrad': Builtin('history', arguments={'float_stable_eps': 'eps'}, older=('float_stable_eps', 'epsilon')),
    'test': Builtin('weight'),
}
OURS_ELSEWHERE = {'adamw': 'mxnet.adamw'}  # what states of it are called here, where its name means another rule


def classes(version: int) -> Dict[str, MXNetClass]:
    """The classes of that version of MXNet by the names that their states have here."""
    return {OURS_ELSEWHERE.get(name, name): one.classes[version] for name, one in BUILTINS.items() if version in one.classes}
