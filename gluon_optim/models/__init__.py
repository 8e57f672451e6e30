"""Weights of Gluon nets for PyTorch: names, layouts, and the optimizer's states in step with them.

    model = go.model_to_torch('run/step-44.safetensors', like=net)       # or a .params file, or a gluon.Block
    net.load_state_dict(model.state_dict())
    optimizer = go.torch.create(model.states().optimizer, net.parameters())
    optimizer.load_state_dict(go.to_torch(model.states()))               # continues where Gluon stopped

Reading and ``model.save('net.safetensors')`` need only NumPy; `TorchModel.state_dict` and ``.pt`` need PyTorch.

**Names** are found in one of three ways.

1. By convention, without ``like`` and ``names``: layers keep their structural names, the rest changes. ``gamma`` is ``weight``,
   ``beta`` is ``bias``, ``moving_mean`` is ``running_mean``, PReLU's ``alpha`` is ``weight``, ``l0_i2h_weight`` is
   ``weight_ih_l0``, and so on.
2. ``like`` gives the required names and shapes: a module, its state_dict, or a file of one. If convention finds all of them,
   that is the answer. Otherwise layers with the same names (without numbers) and shapes are matched, and the rest in order if
   all shapes then agree, or by shapes that occur only once. Anything else is an error that names the first difference.
   Parameters tied in ``like`` are one array, whichever of the names it has in Gluon. If ``like`` has two parameters where a
   checkpoint has one that was shared, both get its values, and the report says so.
3. ``names`` is a map: a dictionary or a JSON file. `suggest_names` writes a draft. With ``like`` it may be partial: what it leaves
   on both sides is matched as without a map. PyTorch's parameters are the keys:

    {"conv1.weight": "features.0.weight",
     "conv2.weight": {"from": "features.1.weight", "transpose": [0, 3, 1, 2]},
     "fc.weight": {"from": "output.weight", "view": [10, 4, 4, 64], "transpose": [0, 3, 1, 2], "shape": [10, 1024]},
     "norm.weight": {"from": "norm.gamma", "repeat": 4},
     "lstm.*": {"from": "lstm_parameters", "rnn": "lstm", "hidden": 64, "layers": 2, "bidirectional": false},
     "drop": ["aux.weight"]}

   An array is viewed with the shape ``view``, transposed, its elements repeated (MXNet 1.x's GroupNorm has one number per group,
   PyTorch's one per channel), and reshaped to ``shape``; ``"ones": true`` is a gamma that ``fix_gamma`` overrides, and
   ``"zeros": true`` the bias of a layer that has none in Gluon, made from its weight. ``"lstm.*"`` stands for all arrays of a
   layer that MXNet keeps in one vector; it may have ``"projection"``, and ``"rnn"`` may also be ``"gru"``, ``"rnn_tanh"`` or
   ``"rnn_relu"``. ``"drop"`` names Gluon parameters that PyTorch's net lacks. Anything that is then missing or left over on one
   side is an error. Without ``like`` the map must be complete.

**Layouts.** Weights of Dense, convolutions and transposed convolutions, normalization, Embedding and recurrent layers are the
same arrays in both. A 1x1 convolution may be a linear layer in the other framework: its weight is reshaped. If it has no bias,
like the last layer of MobileNetV2, and the linear layer of ``like`` has one, that bias is zeros. Channels-last convolutions are
transposed if the Block, the symbol next to the file or the shapes of ``like`` say so. A Dense that follows the Flatten of a
channels-last net must be mapped with ``view``, as above: its inputs are in a different order, which cannot be detected.

>>> import numpy, gluon_optim as go
>>> model = go.model_to_torch({'0.gamma': numpy.ones(2, 'float32'), '0.running_mean': numpy.zeros(2, 'float32')})
>>> list(model.weights)
['0.weight', '0.running_mean']
"""
import dataclasses
import os
from typing import Any, Collection, Dict, List, Mapping, Optional

import numpy

from ..display import Rows, table, text, without_none
from ..requirements import missing
from ..rules.compensated import COMPENSATION, is_compensated
from ..schema import one_of, some_of
from ..states import safetensors_files
from ..states.atomic import Path, replacing
from ..states.model import OptimizerStates, ParameterInfo
from .gluon import Source, source_of, with_states
from .maps import check_map, from_map, read_map, take_dropped
from .matching import MOST, check_layouts, led_by, matched, one_for_tied, rests_on_order, settled, sources_of, with_tied
from .names import conventional, split, torch_leaf
from .plan import Plan, Shape, Take, pointwise
from .pytorch import COUNTER, Target, target_of

__all__ = ['TorchModel', 'model_to_torch', 'suggest_names']

STATISTICS = ('running_mean', 'running_var')


@dataclasses.dataclass(repr=False)
class TorchModel:
    """A net's parameters with PyTorch's names and layouts.

    ``weights``   name -> NumPy array, including running statistics and ``num_batches_tracked``, in the order of the module
    ``rows``      for each: ``name``, ``from`` (Gluon's name), ``shape``, ``dtype`` and ``how`` it was converted
    ``report``    what was assumed and what is left to you, one sentence per line
    ``frozen``    names of parameters that Gluon does not train (``grad_req='null'``, fix_gamma); `freeze` does the same to a module

    Made by `model_to_torch`. ``plan``, ``found``, ``target``, ``dropped`` and ``ordered`` are for its methods, which say what
    they raise.

    >>> import numpy, gluon_optim as go
    >>> model = go.model_to_torch({'0.gamma': numpy.ones(2, 'float32'), '0.beta': numpy.zeros(2, 'float32')})
    >>> [(row['name'], row['from']) for row in model.rows]
    [('0.weight', '0.gamma'), ('0.bias', '0.beta')]
    """

    weights: Dict[str, numpy.ndarray]
    rows: List[Dict[str, Any]]
    report: List[str]
    plan: Plan
    found: Source
    target: Optional[Target] = None
    dropped: List[str] = dataclasses.field(default_factory=list)
    ordered: bool = True

    def _rows(self) -> Rows:
        frozen = self.frozen
        return without_none([('from', self.found.what), ('for', self.target.what if self.target else None),
                             ('optimizer', self.found.states), ('frozen', some_of(frozen) if frozen else None),
                             *(('report', line) for line in self.report)])

    def __repr__(self) -> str:
        return text(f'<TorchModel: {len(self.weights)} arrays>', self._rows())

    def _repr_html_(self) -> str:
        arrays = [(row['name'], f'{row["dtype"]}{row["shape"]} {row["how"]}') for row in self.rows]
        return table(f'TorchModel: {len(self.weights)} arrays', [*self._rows(), *arrays])

    @property
    def frozen(self) -> List[str]:
        null = {*self.found.facts.frozen, *(self.found.shared.get(name, name) for name in self.found.facts.frozen)}
        return [name for name, take in self.plan.items() if name.rpartition('.')[2] not in STATISTICS
                and (take.ones or take.zeros or null & {take.source, self.found.shared.get(take.source, take.source)})]

    def freeze(self, module: Any) -> Any:
        """Call ``requires_grad_(False)`` on the parameters of ``module`` that are `frozen`, and return the module.

        Raises ValueError, before anything is changed, where the module has no parameter of such a name.
        """
        parameters = dict(module.named_parameters())
        tied = {} if self.target is None else self.target.tied
        names = {tied.get(name, name) for name in self.frozen}
        missing = sorted(names - set(parameters))
        if missing:
            raise ValueError(f'`module` must be the one that the weights are for. Received: one without {some_of(missing)}.')
        for name in names:
            parameters[name].requires_grad_(False)
        return module

    def state_dict(self) -> Dict[str, Any]:
        """The weights as PyTorch tensors, for ``module.load_state_dict``; shared parameters are one tensor."""
        try:
            import torch
        except ImportError as error:
            raise missing('The state_dict of a model (not a .safetensors file)', 'PyTorch', 'torch', error) from error
        tensors: Dict[Any, Any] = {}
        return {name: tensors.setdefault(self.plan.get(name, name), torch.from_numpy(_writable(array)))
                for name, array in self.weights.items()}

    def save(self, path: Path, to: Optional[str] = None) -> None:
        """Write a file, completely or not at all.

        ``to`` is 'safetensors', or 'torch' for one that ``torch.load(path, weights_only=True)`` reads; None goes by the extension,
        ``.safetensors``, ``.pt`` or ``.pth``.
        """
        ending = os.path.splitext(os.fspath(path))[1]
        to = to or {'.safetensors': 'safetensors', '.pt': 'torch', '.pth': 'torch'}.get(ending)
        if to == 'safetensors':
            safetensors_files.write(path, self.weights)
        elif to == 'torch':
            state_dict = self.state_dict()
            import torch
            with replacing(path) as file:
                torch.save(state_dict, file)
        else:
            raise ValueError(f"`path` must end in .pt, .pth or .safetensors, or `to` be 'torch' or 'safetensors'. Received: "
                             f'{os.fspath(path)!r}, {to!r}.')

    def states(self, allow_lossy: bool = False) -> OptimizerStates:
        """The optimizer's states under PyTorch's names, in its order and layouts, ready for `to_torch`.

        Parameters
        ----------
        allow_lossy : bool
            Let parameters start fresh if their state cannot be converted: a per-tensor number of a vector that was unpacked, or
            the state of an array with repeated elements. The report says which.

        Returns
        -------
        OptimizerStates
            The order is that of ``module.parameters()`` if ``like`` was a module, else that of the weights or of the
            map. Masters have become the weights, and are in the states only where ``like`` has half precision.

        Parameters that the run did not train are left out and reported.

        Raises ValueError if the states do not belong to these weights, or cannot be converted with them.
        """
        if self.found.states is None:
            raise ValueError(f'There are no optimizer states in {self.found.what}. Read them, states = go.read_states(path, '
                             'params=names), and pass states=states to model_to_torch.')
        if not self.ordered:
            what = self.found.what if self.target is None else self.target.what
            raise ValueError(f"The order of the module's parameters must be known: its optimizer identifies them by position. "
                             f'{what} has them sorted. Pass like= the module or a .pt file of its state_dict, or only a map.')
        return _follow(self, self.found.states, allow_lossy)


def model_to_torch(source: Any, like: Any = None, names: Any = None, states: Optional[OptimizerStates] = None,
                   part: Optional[str] = None) -> TorchModel:
    """The parameters of a Gluon net in the form of a PyTorch net. The module's docstring explains how names are found.

    Parameters
    ----------
    source : path, gluon.Block or dict
        A ``.params`` file of MXNet (``save_parameters``, ``export``, Module; 1.x and 2.x), a file of `save_checkpoint`, a net in
        this process, or arrays by name. A symbol next to an exported file is read too. If a checkpoint has float32 masters,
        they become the weights; compensations are added to the weights, in float32.
    like : torch.nn.Module, state_dict, or path, optional
        Gives the required names and shapes; a path is that of a ``.pt`` or ``.safetensors`` file of a state_dict.
    names : dict or path, optional
        A map of PyTorch's names to Gluon's; with ``like`` it need only hold what cannot be matched without it.
    states : OptimizerStates, optional
        Of the same net, under the same names, if ``source`` is not a checkpoint: for `TorchModel.states`, and for their masters.
    part : str, optional
        Which net, by the name it was saved under, of a checkpoint that holds several.

    Returns
    -------
    TorchModel

    Raises
    ------
    ValueError
        For a parameter that is missing, left over, of another shape, or ambiguous; for a wrong map. It names the parameter.
    OSError
        For a file that cannot be read; a damaged one is an UnreadableFile, which is a ValueError.

    >>> dense = {'0.weight': numpy.ones((2, 3), 'float32'), '1.gamma': numpy.ones(2, 'float32')}
    >>> list(model_to_torch(dense).weights)
    ['0.weight', '1.weight']
    >>> model_to_torch(dense, names={'fc.weight': '0.weight'})
    Traceback (most recent call last):
      ...
    ValueError: The map must name all parameters of the dictionary. Left over: '1.gamma'. Map them, or list them under "drop".
    """
    found, target = source_of(source, part), target_of(like)
    if states is not None:
        found = with_states(found, states)
    given: Plan = {}
    dropped: List[str] = []
    notes: List[str] = []
    complete = False
    if names is not None:
        entries = read_map(names)
        dropped = take_dropped(entries, found)
        given = from_map(entries, found)
        complete = check_map(given, dropped, found, target)
    if target is None:
        plan = given if names is not None else conventional(found, None)
    else:
        plan, found = one_for_tied(given, found, target) if complete else matched(found, target, given, dropped)
        found = _named_as_tied(plan, found)
        check_layouts(plan, found, target)
        notes = rests_on_order({name: take for name, take in plan.items() if name not in given}, found, target)
    model = _made(plan, dropped, found, target, notes)
    model.ordered = target.ordered if target is not None else names is not None or found.ordered
    if model.frozen:
        model.report.append(f'not trained in Gluon: {some_of(model.frozen)}; set requires_grad=False for them, as '
                            'model.freeze(module) does')
    return model


def _named_as_tied(plan: Plan, found: Source) -> Source:
    """``found`` with its states under the names of its weights, where ``plan`` shows that two names are one parameter."""
    if found.states is None:
        return found
    dotted, names = any('.' in name for name in found.states.names), {}
    for info in found.states.parameters:
        prefix, leaf = split(info.name, dotted)
        take = plan.get(prefix + torch_leaf(leaf))
        if info.name not in found.arrays and take is not None and take.source not in found.states.names and (
                found.arrays[take.source].shape == tuple(info.shape)):
            names[info.name] = take.source
    return dataclasses.replace(found, states=found.states.renamed(names))


def suggest_names(source: Any, like: Any = None, part: Optional[str] = None) -> Dict[str, Any]:
    """A draft of the map for ``names``; ``source``, ``like`` and ``part`` as for `model_to_torch`.

    If several parameters fit, or none, the entry is ``{"choose": [...]}``: replace it with one of them.

    Raises ValueError and OSError for a source that cannot be read, as `model_to_torch` does.

    >>> suggest_names({'0.weight': numpy.ones((2, 3)), '0.bias': numpy.ones(2)}, like={'fc.weight': numpy.ones((2, 3))})
    {'fc.weight': {'choose': ['0.weight']}}
    """
    found, target = source_of(source, part), target_of(like)
    try:
        plan = conventional(found, None, draft=True) if target is None else matched(found, target)[0]
    except ValueError:
        if target is None:
            raise
        plan = settled(found, target)
        used = sources_of(plan)
        open_ones = [name for name in target.shapes if not name.endswith(COUNTER) and name not in plan]
        entries = {**_entries(plan), **_choices(open_ones, found, target, used)}
        place = {name: k for k, name in enumerate(target.shapes)}
        return {name: entries[name] for name in sorted(entries, key=lambda name: place.get(name, 0))}
    return _entries(plan)


def _entries(plan: Plan) -> Dict[str, Any]:
    draft: Dict[str, Any] = {}
    for name, take in plan.items():
        packed = take.rnn is not None
        draft[f'{name[:name.rfind(".") + 1]}*' if packed else name] = take.entry()
    return draft


def _choices(names: List[str], found: Source, target: Target, used: Collection[str]) -> Dict[str, Any]:
    """The parameters that could become each of ``names``: the first of its shape, and of its kind and not yet ``used`` if there
    are any.
    """
    similar: Dict[Shape, List[str]] = {}
    words = {other: torch_leaf(split(other, bool(found.dotted))[1]) for other in found.arrays if other not in found.shared}
    for other in words:
        similar.setdefault(_sizes(found.arrays[other].shape), []).append(other)
    lengths = [sizes for sizes in similar if len(sizes) == 1]

    def choices(name: str) -> List[str]:
        wanted = target.shapes[name]
        keys = lengths if len(wanted) == 1 else [_sizes(wanted)]
        fit = [other for key in keys for other in similar.get(key, ())[:2 * MOST] if _may_be(found.arrays[other].shape, wanted)]
        alike = [other for other in fit if words[other] == name.rpartition('.')[2]] or fit
        return ([other for other in alike if other not in used] or alike)[:MOST]

    return {name: {'choose': choices(name)} for name in names}


def _sizes(shape: Shape) -> Shape:
    """What shapes have in common that may be one another's."""
    return tuple(shape) if len(shape) == 1 else tuple(sorted(size for size in shape if size != 1))


def _may_be(shape: Shape, wanted: Shape) -> bool:
    repeated = len(shape) == len(wanted) == 1 and wanted[0] % max(shape[0], 1) == 0
    return repeated or sorted(shape) == sorted(wanted) or pointwise(shape, wanted)


# The result

def _made(plan: Plan, dropped: List[str], found: Source, target: Optional[Target], notes: List[str]) -> TorchModel:
    plan = plan if target is None else with_tied({name: plan[name] for name in plan if name not in target.tied}, target)
    weights: Dict[str, numpy.ndarray] = {}
    rows: List[Dict[str, Any]] = []
    for name, take in plan.items():
        weights[name] = take.of(found.arrays[take.source])
        rows.append({'name': name, 'from': take.source, 'shape': list(weights[name].shape), 'dtype': weights[name].dtype.name,
                     'how': take.words()})
        counter = f'{name[:-len("running_var")]}{COUNTER}'
        if name.rpartition('.')[2] == 'running_var' and counter not in plan and (target is None or counter in target.shapes):
            weights[counter] = numpy.array(_updates(name, plan, found), 'int64')
            rows.append({'name': counter, 'from': None, 'shape': [], 'dtype': 'int64', 'how': 'updates of its layer'})
    if target is not None:
        place = {name: k for k, name in enumerate(target.shapes)}
        weights = {name: weights[name] for name in sorted(weights, key=place.__getitem__)}
        rows.sort(key=lambda row: place[row['name']])
    return TorchModel(weights, rows, notes + _said(plan, dropped, found), plan, found, target, dropped)


def _updates(running_var: str, plan: Plan, found: Source) -> int:
    """The number of updates of the batch norm with ``running_var``: PyTorch counts its batches, MXNet does not."""
    counts = {} if found.states is None else found.states.counts
    prefix = running_var[:-len('running_var')]
    return max((counts.get(plan[name].source, 0) for name in (prefix + 'weight', prefix + 'bias') if name in plan), default=0)


def _said(plan: Plan, dropped: List[str], found: Source) -> List[str]:
    """What was assumed, and what is left to the user."""
    lines = [*found.notes, *found.facts.notes()]
    names: Dict[Take, str] = {}
    for name, take in plan.items():
        first = names.setdefault(take._replace(source=found.shared.get(take.source, take.source)), name)
        if first != name:
            lines.append(f'{name!r} is {first!r}: let the module share them, or they will diverge')
    if any(take.transpose is not None for take in plan.values()):
        lines.append('convolutions were channels last: pass images to the module channels first, and map a Dense after Flatten '
                     'with "view"')
    fixed = [name for name, take in plan.items() if take.ones]
    if fixed:
        lines.append(f'fix_gamma: {some_of(fixed)} are 1, whatever the arrays say')
    if any(take.repeat > 1 for take in plan.values()):
        lines.append('group norm: PyTorch trains one number per channel where Gluon had one per group: equal until the next update')
    if any(name.endswith('running_var') for name in plan):
        lines.append('batch norm: in training, PyTorch adds the unbiased variance of a batch to running_var, MXNet the biased one; '
                     'predictions are equal now, and later drift by 1/n of it, with n values per channel and batch')
    linear = [name for name, take in plan.items() if pointwise(found.arrays[take.source].shape, take.shape)]
    if linear:
        lines.append(f'{some_of(linear)}: a 1x1 convolution in one framework is a linear layer in the other, with the same numbers')
    unbiased = [name for name, take in plan.items() if take.zeros]
    if unbiased:
        lines.append(f'{some_of(unbiased)}: zeros, for a layer that has no bias in Gluon')
    whole = [name for name, take in plan.items() if found.arrays[take.source].dtype.kind != 'f']
    if whole:
        lines.append(f'{" and ".join(map(repr, whole))}: integers, as in Gluon; PyTorch does not train them')
    used = sources_of(plan)
    given_up = set(dropped)
    told = {*given_up, *found.shared, *used}
    lines += [f'{name!r} in Gluon has the values of {other!r}, which was converted: it was assumed to be the same parameter'
              for name, other in led_by(used, found.alike).items() if name not in told]
    lines += [f'{name!r} in Gluon is {other!r}, which was converted' for name, other in led_by(used, found.shared).items()
              if name not in given_up]
    lines += [f'{name!r} in Gluon was dropped, as the map says' for name in dropped]
    return lines


def _writable(array: numpy.ndarray) -> numpy.ndarray:
    array = numpy.ascontiguousarray(array).reshape(array.shape)
    return array if array.flags.writeable else array.copy()


# Optimizer states

def _follow(model: TorchModel, states: OptimizerStates, allow_lossy: bool) -> OptimizerStates:
    infos = {info.name: info for info in states.parameters}
    result = dataclasses.replace(states, parameters=[], counts={}, slots={}, master={}, report=list(states.report))
    untrained: List[str] = []
    for name in _trained(model):
        take = model.plan[name]
        info = infos.get(take.source) or infos.get(model.found.shared.get(take.source, ''))
        if info is None:
            untrained.append(name)
        else:
            _follow_one(model, name, take, info, states, result, allow_lossy)
    if not result.parameters:
        raise ValueError(f'The optimizer states must belong to the parameters of {model.found.what}. Received: those of '
                         f'{one_of(list(infos)[:8])}, ... Read them with the names of the weights as params=.')
    if untrained:
        result.report.append(f'not in the optimizer of the run: {some_of(untrained)}; pass only the others to the one in PyTorch')
    known = {*(take.source for take in model.plan.values()), *model.dropped, *model.found.shared}
    left = [name for name in states.slots if name not in known]
    if left:
        raise ValueError(f'The optimizer has states of {one_of(left[:8])}, not in {model.found.what}. Are they from another net?')
    return result


def _trained(model: TorchModel) -> List[str]:
    """Names of the parameters passed to PyTorch's optimizer, in its order."""
    if model.target is not None and model.target.trained is not None:
        return [name for name in model.target.trained if name in model.plan]
    first: Dict[Take, str] = {}  # a shared parameter counts once, as in module.parameters()
    return [name for name, take in model.plan.items()
            if name.rpartition('.')[2] not in STATISTICS and first.setdefault(take, name) == name]


def _follow_one(model: TorchModel, name: str, take: Take, info: ParameterInfo, states: OptimizerStates, result: OptimizerStates,
                allow_lossy: bool) -> None:
    """Add one parameter to ``result``."""
    weight, half = model.weights[name], model.target is not None and name in model.target.halves
    dtype = 'float16' if half else weight.dtype.name
    result.parameters.append(dataclasses.replace(info, name=name, full_name=name, shape=tuple(weight.shape), dtype=dtype))
    count, slots = states.counts.get(info.name, 0), states.slots.get(info.name)
    result.counts[name] = count
    if take.zeros:  # Gluon has no such parameter, so it does not train it
        result.parameters[-1].grad_req = 'null'
        result.counts[name], slots = 0, None
    scalars = [slot for slot, array in (slots or {}).items() if array.shape != tuple(info.shape)]
    why = _cannot_follow(take, {slot: (slots or {})[slot].shape for slot in scalars})
    if slots is not None and why:
        if not allow_lossy:
            raise ValueError(f'The state of {info.name!r} cannot be converted for {name!r}: {why}. Pass allow_lossy=True to let it '
                             'start fresh.')
        result.report.append(f'lost: the state of {info.name!r}, which becomes {name!r}: {why}')
        result.counts[name], slots = 0, None
    if slots is not None:
        result.slots[name] = {slot: array if slot in scalars else _contiguous(take.of(array)) for slot, array in slots.items()
                              if slot != COMPENSATION.name}   # which is in the weight
        if is_compensated(slots) and half:
            result.master[name] = _contiguous(take.of(model.found.arrays[take.source]))
            result.report.append(f'the compensation of {info.name!r} is in a float32 master of {name!r}, which has the same digits')
    if info.name in states.master and half and not take.zeros:
        result.master[name] = _contiguous(take.of(states.master[info.name]))


def _cannot_follow(take: Take, others: Mapping[str, Shape]) -> str:
    """Why a state with slots of ``others``' shapes, which are not the weight's, cannot change its layout with it, or ''."""
    if take.repeat > 1:
        return 'its elements are repeated'
    if others and take.rnn is not None:
        return f'{one_of(list(others))} is one number for the whole vector'
    axes = [slot for slot, shape in others.items() if shape not in ((), (1,))]
    if axes and (take.view or take.transpose or take.shape):
        return f'{one_of(axes)} follows the axes of the weight, which change'
    return ''


def _contiguous(array: numpy.ndarray) -> numpy.ndarray:
    return numpy.ascontiguousarray(array).reshape(array.shape)
