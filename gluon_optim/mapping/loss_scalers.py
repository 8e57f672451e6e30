"""The loss scaler of a Gluon run as the ``state_dict()`` of PyTorch's ``GradScaler``, and back."""
from typing import Any, Dict, List, Mapping, Optional

__all__ = ['from_torch', 'to_torch', 'what_becomes_of_it']

# our word -> PyTorch's; MXNet uses a new scale one update later, so the next one is what counts
WORDS = {'next_loss_scale': 'scale', 'scale_seq_len': 'growth_interval', 'unskipped': '_growth_tracker'}
FACTORS = {'scale_factor': ('growth_factor', 2.0), 'backoff_factor': ('backoff_factor', 0.5)}  # and those of AMP, which are fixed
KEPT = 'mxnet'  # the key under which all that Gluon's held is kept: ``GradScaler.load_state_dict`` does not look at it


def to_torch(scaler: Optional[Mapping[str, Any]]) -> Dict[str, Any]:
    """The state of a ``GradScaler`` that scales and grows as ``scaler`` does; nothing if there is none, or it is of another kind.

    PyTorch's scale has no upper limit, here it is ``max_loss_scale``.

    >>> to_torch(dict(loss_scale=8.0, next_loss_scale=4.0, max_loss_scale=16.0, scale_seq_len=100, unskipped=3))['scale']
    4.0
    """
    if not scaler or not set(WORDS) <= set(scaler):
        return {}
    factors = {theirs: scaler.get(ours, fixed) for ours, (theirs, fixed) in FACTORS.items()}
    return {**{theirs: scaler[ours] for ours, theirs in WORDS.items()}, **factors, KEPT: dict(scaler)}


def from_torch(state: Mapping[str, Any]) -> Optional[Dict[str, Any]]:
    """The inverse of `to_torch`, also after the ``GradScaler`` went on; None for what is not the state of one.

    >>> state = to_torch(dict(loss_scale=8.0, next_loss_scale=4.0, max_loss_scale=16.0, scale_seq_len=100, unskipped=3))
    >>> from_torch(state)['loss_scale'], from_torch(dict(state, scale=2.0))['loss_scale']
    (8.0, 2.0)
    """
    if not {*WORDS.values(), *(theirs for theirs, _ in FACTORS.values())} <= set(state):
        return None
    found = dict(state.get(KEPT) or {'max_loss_scale': 2.0 ** 24})
    if found.get('next_loss_scale') != state['scale']:
        found['loss_scale'] = state['scale']
    found.update((ours, state[theirs]) for ours, theirs in WORDS.items())
    found.update((ours, state[theirs]) for ours, (theirs, fixed) in FACTORS.items() if ours in found or state[theirs] != fixed)
    return found


def what_becomes_of_it(scaler: Optional[Mapping[str, Any]], to_pytorch: bool) -> List[str]:
    """What the report says of the loss scaler, if there is one."""
    if not scaler:
        return []
    state = to_torch(scaler)
    if not state:
        return [f'the loss scaler {dict(scaler)!r} is not carried over: give its scale to the new one']
    limit = f", which has no upper limit; here it was {scaler['max_loss_scale']!r}" if 'max_loss_scale' in scaler else ''
    arguments = ', '.join(f'{word}={state[key]!r}' for word, key in (
        ('init_scale', 'scale'), ('growth_factor', 'growth_factor'), ('backoff_factor', 'backoff_factor'),
        ('growth_interval', 'growth_interval')))
    if to_pytorch:
        return ["the loss scaler continues: scaler.load_state_dict(checkpoint['loss_scaler']), where checkpoint is this "
                f'state_dict and scaler a torch.amp.GradScaler; a new one is made with {arguments}{limit}']
    return [f'the loss scaler is kept for the way back; what continues must begin with the scale {state["scale"]!r}, multiply it '
            f'by {state["growth_factor"]!r} after {state["growth_interval"]!r} finite steps, {state["_growth_tracker"]!r} of which '
            f'are done, and by {state["backoff_factor"]!r} after one that is not']
