"""The part of `gluon-optim convert` that writes models: weights for PyTorch, and drafts of maps."""
import json
from argparse import ArgumentParser, Namespace
from typing import Any, Dict, Mapping, Optional

from ..models import model_to_torch, suggest_names
from ..models.gluon import of_checkpoint, source_of, with_states
from ..models.pytorch import target_of
from ..states import atomic
from ..states.files import Kind, OpenFile
from ..states.inspection import Contents
from ..states.model import OptimizerStates
from ..transfer.refused import Refused, refusing
from .paths import output_for
from .text import in_options

__all__ = ['ENDINGS', 'SUGGEST', 'add_options', 'default_output', 'report_of', 'states_in_torch_order', 'writes_model']

SUGGEST = 'suggest'
STATES = (Kind.MXNET_STATES, Kind.PYTORCH, Kind.OPTAX)  # kinds of files without weights
WEIGHTS_ONLY = ('--to safetensors writes the weights of a model. For the optimizer write --to torch, or --to mxnet, which makes a '
                'safetensors file of gluon_optim that holds states')
ENDINGS = {'safetensors': '.safetensors', 'torch': '.pt'}  # --to -> ending


def add_options(command: ArgumentParser) -> None:
    """The options for models."""
    command.add_argument('--what', choices=('model', 'optimizer'),
                         help="--to torch of a checkpoint, which holds both: the model's state_dict, or the optimizer's (default)")
    command.add_argument('--like', metavar='FILE', help='a .pt or .safetensors file of a state_dict: the required names and '
                         'shapes. With --what optimizer, the state gets these names, this order and these layouts')
    command.add_argument('--map', metavar='FILE', help="JSON of PyTorch's names to Gluon's, as described in gluon_optim.models; "
                         f"with --like only those that cannot be matched without it. '{SUGGEST}' writes a draft to edit")


def writes_model(options: Namespace, file: OpenFile) -> bool:
    """Whether to write a model or a map of one, not states. ValueError for options that do not fit together."""
    if options.to not in ENDINGS:
        given = [name for name in ('what', 'like', 'map') if getattr(options, name)]
        if given:
            raise ValueError(f'--{given[0]} goes with --to torch or safetensors. Received: --to {options.to}. Leave it out.')
        return False
    if options.to == 'safetensors' and options.what == 'optimizer':
        raise ValueError(f'{WEIGHTS_ONLY}.')
    if options.to == 'safetensors' and file.kind in STATES:
        raise ValueError(f'{WEIGHTS_ONLY}. Received: {options.file!r}, a file of kind {file.kind.value!r}.')
    if options.to == 'safetensors' and (file.kind.is_ours or file.kind is Kind.SAFETENSORS) and options.params:
        raise ValueError(f'{WEIGHTS_ONLY}. Received: {options.file!r} and --params. Convert the .params file itself, or a '
                         'checkpoint, which has its weights, without --params.')
    if options.map == SUGGEST or options.to == 'safetensors' or options.what is not None:
        return bool(options.map == SUGGEST or options.what != 'optimizer')
    return file.kind.holds_parameters


def default_output(options: Namespace) -> str:
    """The default output of a model or a draft of a map; not that of an optimizer's states from the same file."""
    if options.map == SUGGEST:
        return output_for(options.file, '.map.json')
    return output_for(options.file, ('.model' if options.what == 'model' else '') + ENDINGS[options.to])


def report_of(options: Namespace, file: OpenFile, output: str) -> Dict[str, Any]:
    """Write the model or the draft of a map that the options ask for; returns the report, as JSON values."""
    with refusing(reading=True):
        source, target = source_of(file), target_of(options.like)
    if options.map == SUGGEST:
        with refusing():
            return _suggest(options, source, target, output)
    with refusing(reading=True):
        model = model_to_torch(source, target, options.map)
    with refusing():
        model.save(output, options.to)
    return {'input': options.file, 'output': output, 'to': options.to, 'what': 'model', 'parameters': model.rows, 'lost': [],
            'report': [in_options(line) for line in model.report]}


def _suggest(options: Namespace, source: Any, target: Any, output: str) -> Dict[str, Any]:
    draft = suggest_names(source, target)
    open_ones = [name for name, entry in draft.items() if isinstance(entry, Mapping) and 'choose' in entry]
    with atomic.replacing(output) as file:
        file.write((json.dumps(draft, indent=1, ensure_ascii=False) + '\n').encode())
    todo = f'{len(open_ones)} entries must be chosen: ' if open_ones else 'complete: check it, '
    report = [f'{todo}edit {output} and pass it as --map {output}']
    return {'input': options.file, 'output': output, 'to': options.to, 'what': 'map', 'lost': [], 'report': report, 'parameters': [
        {'name': name, 'from': entry.get('from') if isinstance(entry, Mapping) else entry,
         'how': 'choose one' if name in open_ones else 'as proposed', 'shape': [], 'dtype': ''} for name, entry in draft.items()]}


def states_in_torch_order(options: Namespace, contents: Contents) -> Optional[OptimizerStates]:
    """The states under PyTorch's names if --like or --map ask for them, with the weights in ``contents`` likewise; else None."""
    if options.like is None and options.map is None:
        return None
    if contents.states is None:
        return None
    if contents.run is None and not contents.parameters:
        raise Refused(f'--like and --map also need the weights, which {options.file!r} does not hold. Pass the .params file '
                              'as --params.')
    with refusing(reading=True):
        run = contents.run
        source = (of_checkpoint(repr(options.file), contents.states, run) if run
                  else with_states(source_of(contents.parameters), contents.states))
        model = model_to_torch(source, target_of(options.like), options.map)
    with refusing():
        states = model.states(allow_lossy=options.allow_lossy)
    contents.parameters = {name: model.weights[name] for name in states.names}
    return states
