"""A picture of the magnitudes in a state's arrays, layer by layer."""
from typing import Any, Dict, List, Tuple

import numpy

from ..requirements import missing
from .inspection import WHOLE, Contents, arrays_of

__all__ = ['draw']

_COLORS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#56b4e9', '#e69f00')


def draw(contents: Contents, path: str) -> None:
    """Write a picture with one panel per slot, in the format given by the extension of ``path``.

    Each panel shows the parameters in trainer order. A line runs from the 5th to the 95th percentile of the elements'
    magnitudes, leaving out zeros, and a dot marks the median; an open circle at the bottom means all zeros, a cross that
    some elements are not finite.

    Raises ValueError if there is nothing to draw or the extension is unknown, ImportError without matplotlib.
    """
    panels = _panels(contents)
    if not panels:
        raise ValueError(f'Nothing to draw: {contents.path!r} holds no arrays.')
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing('a picture', 'matplotlib', 'plot', error) from None
    names = list(arrays_of(contents))
    names = [name for name in names if any(name in panel for panel in panels.values())]
    width = min(max(7.0, 0.19 * len(names) + 1.5), 60.0)
    figure = Figure(figsize=(width, 2.2 * len(panels) + 0.09 * max(map(len, names)) + 0.8), layout='constrained')
    FigureCanvasAgg(figure)
    states = contents.states
    title = f'{states.optimizer or "unknown optimizer"} at update {states.num_update}' if states else contents.path
    figure.suptitle(f'{title}\nmagnitudes of the elements: median, 5th to 95th percentile', fontsize=11)
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (key, panel), color in zip(rows, panels.items(), _COLORS * len(panels)):
        _draw_panel(axes, key, [panel.get(name) for name in names], color)
    rows[-1].set_xticks(range(len(names)), names, rotation=90, fontsize=8 if len(names) < 200 else 5)
    rows[-1].set_xlim(-0.8, len(names) - 0.2)
    figure.align_ylabels()
    figure.savefig(path, dpi=110)


def _panels(contents: Contents) -> Dict[str, Dict[str, numpy.ndarray]]:
    """Arrays by slot, then by parameter."""
    panels: Dict[str, Dict[str, numpy.ndarray]] = {}
    for name, arrays in arrays_of(contents).items():
        for key, array in arrays.items() if name != WHOLE else ():
            panels.setdefault(key, {})[name] = array
    return panels


def _draw_panel(axes: Any, key: str, arrays: List[Any], color: str) -> None:
    spans = {place: _span(array) for place, array in enumerate(arrays) if array is not None and array.size}
    drawn = {place: span for place, span in spans.items() if span[1] > 0}
    bottom = min((span[0] for span in drawn.values()), default=1e-8) / 3
    for place, (low, middle, high) in drawn.items():
        axes.plot([place, place], [low, high], color=color, linewidth=2.2, solid_capstyle='butt', alpha=0.55)
        axes.plot(place, middle, 'o', color=color, markersize=4)
    empty = [place for place in spans if place not in drawn]
    axes.plot(empty, [bottom] * len(empty), 'o', color=color, markersize=4, fillstyle='none')
    broken = [place for place in spans if not numpy.isfinite(arrays[place]).all()]
    axes.plot(broken, [drawn.get(place, (bottom, bottom, bottom))[2] for place in broken], 'x', color='black', markersize=7)
    axes.set_yscale('log')
    axes.set_ylabel(f'|{key}|')
    axes.grid(axis='y', color='#dddddd', linewidth=0.6)
    axes.spines[['top', 'right']].set_visible(False)


def _span(array: numpy.ndarray) -> Tuple[float, float, float]:
    """5th, 50th and 95th percentile of the finite, nonzero magnitudes; zeros if there are none."""
    magnitudes = numpy.abs(array.reshape(-1))
    magnitudes = magnitudes[numpy.isfinite(magnitudes) & (magnitudes > 0)].astype('float64')
    if not magnitudes.size:
        return 0.0, 0.0, 0.0
    low, middle, high = numpy.quantile(magnitudes, [0.05, 0.5, 0.95])
    return float(low), float(middle), float(high)
