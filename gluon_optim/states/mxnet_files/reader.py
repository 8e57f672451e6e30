"""MXNet's own files, `.params` and `.states` of all versions, read without MXNet and without executing anything.

`ndarray_format` decodes arrays, `inert_pickle` reads the pickle in a `.states` file; this module adds the names.
"""
import collections
import re
from typing import Any, Callable, Collection, Dict, List, Mapping, Optional, Set, Tuple, Type, Union

import numpy

from ... import rules
from ...rules import Rule
from ...rules.compensated import is_compensated, with_compensation
from ...schedules.catalog import base_lr_of
from ...schema import Values, one_of
from ..errors import UnreadableFile, reading
from ..file_part import FilePart
from ..files import ZIP_MAGIC, Kind, OpenFile, Path, open_once
from ..model import OptimizerStates, ParameterInfo
from ..nesting import take_apart
from .builtins import BUILTINS, Layout
from .inert_pickle import Array, Object, load
from .names import Params, assign
from .ndarray_format import read_list, read_npz

__all__ = ['UnreadableFile', 'read_params', 'read_states']

MAX_ITEMS = 100_000
PLAIN = (int, float, bool, str, type(None))


def read_params(path: Union[Path, OpenFile], limit: Optional[int] = None) -> Dict[str, numpy.ndarray]:
    """The arrays of a ``.params`` file of any version of MXNet: `nd.save`, `Block.save_parameters`, `npx.savez`, Module.

    Parameters
    ----------
    path : str or path
    limit : int, optional
        Bytes of memory that the arrays may take; by default twice the file size, or 32 MiB if that is more. Files with
        sparse arrays, which become dense, may need it.

    Returns
    -------
    dict
        By name; '0', '1', ... for a file written from a list. Module's prefixes 'arg:' and 'aux:' are removed. bfloat16
        becomes float32. Devices are ignored.

    Raises
    ------
    UnreadableFile
        If the file is damaged or of another kind. The message says what is wrong and at which byte.
    """
    with open_once(path) as file, reading(file.path):
        source = file.part(limit)
        if file.kind is Kind.PARAMS:
            arrays, names = read_list(source)
        elif file.head.startswith(ZIP_MAGIC):
            return _without_prefixes(read_npz(source))
        else:
            source.fail(f'the file must be from mx.nd.save or npx.savez. {_what_it_is(file.kind)}', 0)
    named = dict(zip(names or map(str, range(len(arrays))), arrays))
    if len(named) < len(arrays):
        repeated = sorted(name for name, count in collections.Counter(names).items() if count > 1)
        raise UnreadableFile(f'Cannot read {file.path!r}: the names {one_of(repeated[:8])} occur twice.')
    return _without_prefixes(named)


def read_states(path: Union[Path, OpenFile], params: Params = None, allow: Collection[str] = (),
                limit: Optional[int] = None, nested: str = '') -> OptimizerStates:
    """The optimizer states of a ``.states`` file of MXNet 1.x or 2.x. Nothing that the file names is imported or called.

    Files of `Trainer.save_states`, `KVStore.save_optimizer_states`, `Updater.get_states` and Module can be read, with or
    without the optimizer in them, written by Python 2 or 3, for every optimizer of MXNet and of this package.

    Parameters
    ----------
    path : str or path
    params : list of str, dict, or path of a ``.params`` file, optional
        The files identify parameters by their index in the trainer. A list gives the names in the trainer's order
        (``[p.name for p in trainer._params]``). A dictionary of names to arrays, parameters or shapes, and a ``.params``
        file, are used in their own order or sorted by name, as in trainers, whichever fits the shapes. Without it,
        parameters are called '0', '1', ... by index.
    allow : collection of str
        Import paths of further classes, such as your own scheduler: their attributes are read, but they are not imported.
    limit : int, optional
        As in `read_params`.
    nested : str, optional
        The import path of an optimizer of MXNet. Its states are left as MXNet nests them, like those of a class of your own.

    Returns
    -------
    OptimizerStates
        ``hypers`` under the argument names of the MXNet version that wrote the file; ``counts`` are the largest over all
        devices, without ``begin_num_update``. If the file lacks the optimizer, ``optimizer`` is '', slots are called
        '0', '1', ..., and counts are 0. ``report`` says what was assumed.

    Raises
    ------
    UnreadableFile
        If the file is damaged, of another kind, or names anything other than optimizers, schedulers and arrays.
    ValueError
        If ``params`` does not fit the file, or leaves open which state belongs to which parameter.
    """
    with open_once(path) as file, reading(file.path, TypeError, KeyError):  # of `params`
        source = file.part(limit)
        if file.kind is not Kind.MXNET_STATES:
            source.fail(f'the file must be from Trainer.save_states. {_what_it_is(file.kind)}', 0)
        value = load(source, [allow] if isinstance(allow, str) else allow)
        states, optimizer = value if type(value) is tuple and len(value) == 2 else (value, None)
        if optimizer is not None and (type(optimizer) is not Object or type(optimizer.attributes) is not dict):
            source.fail('the second half of the pickle must be an optimizer.')
        if type(states) is not dict:
            source.fail("the file must hold an updater's states: a dictionary by index, or a pair of that and the optimizer.")
        return _Reader(source, states, optimizer, nested).read(params)


def _what_it_is(kind: Kind) -> str:
    if kind is Kind.PARAMS:
        return 'It holds parameters: use read_params.'
    if kind in (Kind.NPZ, Kind.OPTAX, Kind.PYTORCH):
        return 'It is a zip file, probably of parameters: use read_params.'
    if kind is Kind.MXNET_STATES:
        return 'It is a pickle, probably of optimizer states: use read_states.'
    return 'It is a safetensors file.' if kind.is_ours or kind is Kind.SAFETENSORS else 'It does not begin like an MXNet file.'


def _without_prefixes(arrays: Dict[str, numpy.ndarray]) -> Dict[str, numpy.ndarray]:
    """The arrays without Module's 'arg:' and 'aux:' before the names."""
    if not all(name.startswith(('arg:', 'aux:')) for name in arrays):
        return arrays
    short = {name[4:]: array for name, array in arrays.items()}
    return short if len(short) == len(arrays) else arrays


BASE_ARGUMENTS = (('lr', 'learning_rate'), ('wd', 'wd'), ('rescale_grad', 'rescale_grad'), ('clip_gradient', 'clip_gradient'))
# A pickled optimizer consists of its attributes; these are neither arguments nor state.
BOOKKEEPING = ('lr', 'lr_scheduler', 'lr_mult', 'wd_mult', 'begin_num_update', 'num_update', '_all_index_update_counts',
               '_index_update_count', 'multi_precision', 'aggregate_num', 'idx2name', 'sym_info', 'allow_np_array',
               'use_fused_step')


def _fits(state: Any, layout: Layout) -> bool:
    """Whether a state has this layout; any of its arrays may be None (without momentum)."""
    if layout is None:
        return state is None
    if isinstance(layout, str):
        return state is None or type(state) is Array
    return type(state) is tuple and len(state) == len(layout) and all(x is None or type(x) is Array for x in state)


def _arrays(state: Any, layout: Layout) -> Dict[str, Array]:
    names = (layout,) if isinstance(layout, str) else layout or ()
    values = (state,) if isinstance(layout, str) else state or ()
    return {name: value for name, value in zip(names, values) if value is not None}


class _Reader:
    """One unpickled file; the arrays are still in it."""

    def __init__(self, source: FilePart, states: Dict[Any, Any], optimizer: Optional[Object], nested: str):
        self.source, self.states, self.optimizer = source, states, optimizer
        self.attributes: Dict[str, Any] = optimizer.attributes if optimizer else {}
        self.report: List[str] = []
        self.visits = 0
        path: str = optimizer.path if optimizer else ''
        version_2 = 'use_fused_step' in self.attributes or re.match(r'mxnet\.optimizer\.(?!optimizer|contrib)\w+\.', path)
        self.version = 2 if version_2 else 1
        # somebody else's AdamW is not ours; optimizers made from users' own rules have the names of their hyper-parameters
        ours = path.startswith('gluon_optim.') or '_names' in self.attributes
        self.ours = _rule(path.rpartition('.')[2]) if ours else None
        self.class_name = path.rpartition('.')[2].lower()
        self.builtin = BUILTINS.get(self.class_name) if path.startswith('mxnet.') and path != nested else None
        if path.startswith('mxnet.') and path != nested and self.builtin is None:
            source.fail(f'the second half of the pickle must be an optimizer. Received: {path}.')

    def read(self, params: Params) -> OptimizerStates:
        by_index = all(type(key) is int and key >= 0 for key in self.states)
        if not by_index and not all(type(key) is str for key in self.states):
            self.source.fail('states must be stored by index or by name.')
        name, hypers, counts = self._name(), self._hypers(), self._counts()
        slots, masters = self._states(hypers)
        shapes = {key: _weight_shape(slots[key], masters.get(key)) for key in slots}
        versions = [self.version] if self.optimizer else [1, 2]
        num_update = self._whole(self.attributes.get('num_update', 0), 'num_update')
        infos, keys, report = assign(shapes, params, self._table('idx2name', str), versions, read_params,
                                     copies=self.optimizer is None)  # Module does not save it
        names = {key: info.name for info, key in zip(infos, keys) if key is not None}
        self._describe(infos, keys, slots, masters)
        return OptimizerStates(
            optimizer=name, hypers=hypers, num_update=num_update, parameters=infos,
            counts={info.name: counts.get(key, 0) for info, key in zip(infos, keys)},
            slots={names[key]: slots[key] for key in names}, master={names[key]: masters[key] for key in names if key in masters},
            scheduler=self._scheduler(), variables=self._variables(names),
            trees={names[key]: tree for key, tree in self._trees().items()},
            producer={'mxnet': f'{self.version}.x'} if self.optimizer else {}, report=[*self.report, *report])

    # -- the optimizer ------------------------------------------------------------------------------------------------

    def _name(self) -> str:
        if self.optimizer is None:
            self.report.append('The file does not contain its optimizer: hyper-parameters, update counts and the meaning of '
                               'the slots are unknown.')
            return ''
        if self.ours is not None:
            return self.ours.name
        if self.class_name == 'adamw' and self.builtin:
            self.report.append("MXNet 2's AdamW is not gluon_optim's adamw (the learning rate does not multiply its decay): it is "
                               "called 'mxnet.adamw' here.")
            return 'mxnet.adamw'
        if self.builtin is None:
            self.report.append(f'{self.optimizer.path} is not an optimizer of MXNet that has a rule here, or of gluon_optim: its '
                               'slots are numbered by position.')
        # of the same name as one with a rule
        unlike = self.builtin is None and self.class_name in rules.names(drop_ins=True, samplers=True)
        return self.optimizer.path if unlike else self.class_name

    def _hypers(self) -> Dict[str, Any]:
        if self.optimizer is None:
            return {}
        if self.ours is not None:
            return self._own_hypers(self.ours)
        if self.builtin is not None:
            arguments = [*BASE_ARGUMENTS, *self.builtin.argument_names()]
        else:
            arguments = [('lr', 'learning_rate'), *((key, '') for key, value in self.attributes.items()
                                                    if key not in BOOKKEEPING and type(value) in PLAIN)]
        hypers = {argument or attribute: self._scalar(self.attributes[attribute], attribute)
                  for attribute, argument in arguments if attribute in self.attributes}
        if hypers.get('learning_rate') is None:
            hypers['learning_rate'] = self._base_lr()
        updates, per_epoch = self.attributes.get('init_updates'), hypers.get('updates_per_epoch')
        if self.class_name == 'lbsgd' and type(updates) is int and type(per_epoch) is int and per_epoch > 0:
            hypers['begin_epoch'] = updates // per_epoch
        if self.class_name == 'adabelief' and hypers.get('correct_bias') is True:
            del hypers['correct_bias']  # True, as in gluon_optim's, which has no such option
        return hypers

    def _own_hypers(self, rule: Type[Rule]) -> Dict[str, Any]:
        """The hyper-parameters of one of our rules, checked by it. As in our own files, the rate is the scheduler's, if any."""
        names = self.attributes.get('_names')
        names = names if type(names) is tuple else [hyper.name for hyper in rule.declared({}) + rules.base.BASE_HYPERS]
        given = {name: self._scalar(self.attributes[name], name) for name in names if type(name) is str and name in self.attributes}
        scheduled = self.attributes.get('lr_scheduler') is not None
        given['learning_rate'] = self._base_lr() if scheduled else self._scalar(self.attributes.get('lr'), 'lr')
        try:
            return rule.hyperparameters(**{**rule.older, **given}).asdict()
        except (KeyError, TypeError, ValueError) as error:
            self.source.fail(f'the hyper-parameters must be those of {rule.name}. {error}')

    def _base_lr(self) -> Any:
        return self._scalar(base_lr_of(self._scheduler() or {}), 'base_lr')

    def _scalar(self, value: Any, what: str) -> Any:
        if type(value) is Array:  # 2.0's AdamW turns rescale_grad into one
            array = value.read()
            value = array.reshape(-1)[0].item() if array.size == 1 else array
        if type(value) not in PLAIN:
            self.source.fail(f'the attribute {what!r} of the optimizer must be a number, a string or None.')
        return value

    def _whole(self, value: Any, what: str) -> int:
        if type(value) is not int or value < 0:
            self.source.fail(f'{what} must be an integer, 0 or more.')
        return value

    def _counts(self) -> Dict[Any, int]:
        """The largest count of each index: a device may have started later, or been dropped."""
        per_device = self.attributes.get('_all_index_update_counts')
        tables = list(per_device.values()) if type(per_device) is dict else []
        tables += [self.attributes.get(name, {}) for name in ('_index_update_count', '_restored_counts')]
        begin = self._whole(self.attributes.get('begin_num_update', 0), 'begin_num_update')
        counts: Dict[Any, int] = {}
        for table in self._dictionaries(tables, 'update counts'):
            for key, count in table.items():
                counts[key] = max(counts.get(key, 0), self._whole(count, 'an update count') - begin)
        return counts

    def _dictionaries(self, tables: List[Any], what: str) -> List[Dict[Any, Any]]:
        if not all(type(table) is dict for table in tables) or sum(map(len, tables)) > MAX_ITEMS:
            self.source.fail(f'{what} must be dictionaries with at most {MAX_ITEMS} entries together.')
        return tables

    def _scheduler(self) -> Optional[Dict[str, Any]]:
        scheduler = self.attributes.get('lr_scheduler')
        if scheduler is None:
            return None
        if type(scheduler) is not Object:
            self.source.fail('the scheduler must be an object.')
        record: Dict[str, Any] = self._plain(scheduler, 0)
        return record

    def _visit(self, depth: int = 0) -> None:
        """Called for each value visited: a small file can refer to one list very often, or to a list from within itself."""
        self.visits += 1
        if self.visits > MAX_ITEMS or depth > 20:
            self.source.fail('the values in the file are too many, or nested too deeply.')

    def _plain(self, value: Any, depth: int) -> Any:
        """Lists, dictionaries and objects of scalars, as JSON values."""
        self._visit(depth)
        if type(value) in (list, tuple):
            return [self._plain(x, depth + 1) for x in value]
        if type(value) is dict:
            return {key: self._plain(x, depth + 1) for key, x in value.items()}
        if type(value) is Object:
            return {'class': value.path, 'attributes': self._plain(value.attributes or {}, depth + 1)}
        return self._scalar(value, 'lr_scheduler')

    def _variables(self, names: Mapping[Any, str]) -> Dict[str, numpy.ndarray]:
        """State of the optimizer as a whole: numbers, and for lbsgd a dictionary of numbers and arrays per parameter."""
        found: Dict[str, numpy.ndarray] = {}
        if self.ours is not None and type(self.attributes.get('seed')) is int:   # of one that draws noise
            streams = self.attributes.get('streams')
            found['seed'] = numpy.array(self.attributes['seed'])
            found.update((f'stream:{names.get(key, key)}', numpy.array(stream)) for key, stream in
                         (streams if type(streams) is dict else {}).items())
        for variable in self.builtin.variables if self.builtin else ():
            value = self.attributes.get(variable)
            tables = value if type(value) is dict else {None: {variable: value}}
            for key, table in zip(tables, self._dictionaries(list(tables.values()), variable)):
                for part, content in table.items():
                    name = str(part) if key is None else f'{part}:{names.get(key, key)}'
                    if type(content) is Array:
                        found[name] = content.read()
                    elif type(content) in (int, float):
                        whole = type(content) is int and abs(content) < 1 << 63
                        found[name] = numpy.array(content, 'int64' if whole else 'float64')
        return found

    # -- states -------------------------------------------------------------------------------------------------------

    def _splitter(self, hypers: Dict[str, Any]) -> Callable[[Any], Tuple[Dict[str, Array], Optional[Array]]]:
        """A function that splits one parameter's state into slots and master."""
        if self.ours is not None:
            slots = self.ours.slots(Values(**hypers))
            layouts: Tuple[Layout, ...] = tuple(tuple(slot.name for slot in held) for held in (slots, with_compensation(slots)))
        elif self.builtin is not None:
            layouts = self.builtin.layouts(self.version)
        else:
            return lambda state: (self._nested(state)[1], None)
        last = self.builtin is not None and self.builtin.is_master_last(self.version)

        def split(state: Any) -> Tuple[Dict[str, Array], Optional[Array]]:
            for layout in layouts:
                if _fits(state, layout):
                    return _arrays(state, layout), None
                if type(state) is tuple and len(state) == 2:
                    rest, master = state if last else state[::-1]
                    if type(master) is Array and _fits(rest, layout):
                        return _arrays(rest, layout), master
            self.source.fail(f'the state of a parameter must be what {self.class_name!r} keeps: {one_of(layouts)}, or those '
                             'and a master.')
        return split

    def _nested(self, state: Any) -> Tuple[Any, Dict[str, Array]]:
        """The tree of a state of unknown meaning, and its arrays by their places."""
        self._walk(state, 0)
        if state is not None and type(state) not in (tuple, list, dict, Array):
            self.source.fail('the state of a parameter must consist of arrays.')
        try:
            return take_apart(state, Array)
        except TypeError as error:
            self.source.fail(f'the state of a parameter must consist of arrays: {error}.')

    def _walk(self, state: Any, depth: int) -> None:
        self._visit(depth)
        for part in state.values() if type(state) is dict else state if type(state) in (tuple, list) else ():
            self._walk(part, depth + 1)

    def _trees(self) -> Dict[Any, Any]:
        """How the states of an optimizer nest that is neither MXNet's nor ours."""
        if self.optimizer is None or self.ours is not None or self.builtin is not None:
            return {}
        others = [name for name, value in self.attributes.items() if name not in BOOKKEEPING and type(value) not in PLAIN]
        if others:
            self.report.append(f'The attributes {one_of(others[:8])} of {self.class_name} are not numbers or texts, and were not '
                               'read.')
        return {key: self._nested(state)[0] for key, state in self.states.items()}

    def _states(self, hypers: Dict[str, Any]) -> Tuple[Dict[Any, Dict[str, numpy.ndarray]], Dict[Any, numpy.ndarray]]:
        """Slots and masters of all parameters, by key."""
        split = self._splitter(hypers)
        scalars = {slot.name for slot in self.ours.slots(Values(**hypers)) if slot.like == 'scalar'} if self.ours else set()
        slots: Dict[Any, Dict[str, numpy.ndarray]] = {}
        masters: Dict[Any, numpy.ndarray] = {}
        for key in sorted(self.states):
            arrays, master = split(self.states[key])
            slots[key] = {name: self._single(array.read()) if name in scalars else array.read() for name, array in arrays.items()}
            if master is not None:
                masters[key] = master.read()
            shapes = {array.shape for name, array in slots[key].items() if name not in scalars}
            shapes.update(masters[key].shape for _ in arrays if key in masters)
            if len(shapes) > 1 and (self.ours or self.builtin):
                self.source.fail(f'the arrays of parameter {key!r} must have the same shape. Received: {sorted(shapes)}.')
        return slots, masters

    def _single(self, array: numpy.ndarray) -> numpy.ndarray:
        if array.size != 1:
            self.source.fail(f'a slot of {self.class_name} must be a single number. Received: an array of shape {array.shape}.')
        return array.reshape(())

    def _describe(self, infos: List[ParameterInfo], keys: List[Any], slots: Mapping[Any, Any], masters: Mapping[Any, Any]) -> None:
        """Fill in the multipliers, and the types of weights if ``params`` did not give them."""
        lr_mult, wd_mult, idx2name = self._table('lr_mult', float), self._table('wd_mult', float), self._table('idx2name', str)
        for info, key in zip(infos, keys):
            name = idx2name.get(key, info.name)
            info.lr_mult, info.wd_mult = (float(table.get(key, table.get(name, 1.0))) for table in (lr_mult, wd_mult))
            if not info.dtype:
                types = (array.dtype.name for array in slots.get(key, {}).values())
                half = key in masters or is_compensated(slots.get(key, {}))
                info.dtype = 'float16' if half else next(types, 'float32')

    def _table(self, name: str, kind: type) -> Dict[Any, Any]:
        table, kinds = self.attributes.get(name, {}), (str,) if kind is str else (int, float)
        if type(table) is not dict or not all(type(x) in kinds for x in table.values()):
            self.source.fail(f'the attribute {name!r} of the optimizer must be a dictionary of {kind.__name__} values.')
        return table


def _rule(class_name: str) -> Optional[Type[Rule]]:
    """Our rule for the optimizer class with that name."""
    plain = {name.replace('_', ''): name for name in rules.names(samplers=True)}
    return rules.get(plain[class_name.lower()]) if class_name.lower() in plain else None


def _weight_shape(slots: Mapping[str, numpy.ndarray], master: Optional[numpy.ndarray]) -> Optional[Tuple[int, ...]]:
    """The shape of the weight inferred from its state; None if that is impossible."""
    shapes: Set[Tuple[int, ...]] = {array.shape for array in slots.values()} if master is None else {master.shape}
    wide = {shape for shape in shapes if shape not in ((), (1,))} or shapes
    return wide.pop() if len(wide) == 1 else None
