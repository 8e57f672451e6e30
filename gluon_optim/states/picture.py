"""A picture of the magnitudes in a state's arrays, layer by layer."""
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import numpy

from ..requirements import missing
from .inspection import WHOLE, Contents, arrays_of

__all__ = ['draw']

Span = Tuple[float, float, float]  # 5th, 50th and 95th percentile
MOST_ROWS = 70  # of parameters below one another
_COLORS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#56b4e9', '#e69f00')


def draw(contents: Contents, path: str) -> None:
    """Write a picture with one panel per slot, in the format given by the extension of ``path``.

    Parameters stand one below the other in the order of the net, in several columns where they are many. A line runs from the
    5th to the 95th percentile of the elements' magnitudes, leaving out zeros, and a dot marks the median; an open circle at
    the left means all zeros, a cross that some elements are not finite.

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
    names = [name for name in arrays_of(contents) if any(name in panel for panel in panels.values())]
    columns = -(-len(names) // MOST_ROWS)
    rows = -(-len(names) // columns)
    width = 0.075 * max(map(len, names)) + 1.9 * len(panels) + 0.4
    figure = Figure(figsize=(max(width * columns, 7.0), 0.17 * rows + 1.6), layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(f'{_title(contents)}\nmagnitudes of the elements', fontsize=11)
    grid = figure.subplots(1, columns * len(panels), squeeze=False)[0]
    for k, (key, panel) in enumerate(panels.items()):
        spans = {name: _span(array) for name, array in panel.items() if array.size}
        limits = _limits(spans.values())
        for column in range(columns):
            part = names[column * rows:(column + 1) * rows]
            axes = grid[column * len(panels) + k]
            _draw_panel(axes, [(panel.get(name), spans.get(name)) for name in part], _COLORS[k % len(_COLORS)], limits)
            axes.set_title(key, fontsize=9)
            axes.set_yticks(range(len(part)), part if k == 0 else [''] * len(part), fontsize=7.5)
            axes.set_ylim(rows - 0.4, -0.6)
    figure.legend(handles=_legend(), loc='outside lower center', ncol=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def _title(contents: Contents) -> str:
    states = contents.states
    return contents.path if states is None else f'{states.optimizer or "unknown optimizer"} at update {states.num_update}'


def _legend() -> List[Any]:
    from matplotlib.lines import Line2D
    gray = '#555555'
    return [Line2D([], [], color=gray, linewidth=2.2, alpha=0.55, label='5th to 95th percentile'),
            Line2D([], [], color=gray, marker='o', linestyle='', markersize=4, label='median'),
            Line2D([], [], color=gray, marker='o', linestyle='', markersize=4, fillstyle='none', label='all zeros'),
            Line2D([], [], color='black', marker='x', linestyle='', markersize=6, label='not all finite')]


def _limits(spans: Iterable[Span]) -> Tuple[float, float]:
    """Ends of a logarithmic axis that has room for all of ``spans``."""
    drawn = [span for span in spans if span[1] > 0]
    return min((low for low, _, _ in drawn), default=1e-8) / 4, max((high for _, _, high in drawn), default=1.0) * 2


def _panels(contents: Contents) -> Dict[str, Dict[str, numpy.ndarray]]:
    """Arrays by slot, then by parameter."""
    panels: Dict[str, Dict[str, numpy.ndarray]] = {}
    for name, arrays in arrays_of(contents).items():
        for key, array in arrays.items() if name != WHOLE else ():
            panels.setdefault(key, {})[name] = array
    return panels


def _draw_panel(axes: Any, arrays: Sequence[Tuple[Any, Optional[Span]]], color: str, limits: Tuple[float, float]) -> None:
    for place, (array, span) in enumerate(arrays):
        if array is None or span is None:
            continue
        low, middle, high = span if span[1] > 0 else (limits[0] * 1.5,) * 3
        if span[1] > 0:
            axes.plot([low, high], [place, place], color=color, linewidth=2.2, solid_capstyle='butt', alpha=0.55)
        axes.plot(middle, place, 'o', color=color, markersize=4, fillstyle='full' if span[1] > 0 else 'none')
        if not numpy.isfinite(array).all():
            axes.plot(middle, place, 'x', color='black', markersize=6)
    axes.set_xscale('log')
    axes.set_xlim(limits)
    axes.tick_params(axis='x', labelsize=7)
    axes.grid(axis='x', color='#dddddd', linewidth=0.6)
    axes.spines[['top', 'right']].set_visible(False)


def _span(array: numpy.ndarray) -> Span:
    """5th, 50th and 95th percentile of the finite, nonzero magnitudes; zeros if there are none."""
    magnitudes = numpy.abs(array.reshape(-1))
    magnitudes = magnitudes[numpy.isfinite(magnitudes) & (magnitudes > 0)].astype('float64')
    if not magnitudes.size:
        return 0.0, 0.0, 0.0
    low, middle, high = numpy.quantile(magnitudes, [0.05, 0.5, 0.95])
    return float(low), float(middle), float(high)
