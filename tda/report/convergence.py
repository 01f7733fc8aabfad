"""What falls with work: one panel for each case, on logarithmic axes."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from tda.report import style
from tda.report.names import display

if TYPE_CHECKING:
  from matplotlib.axes import Axes

COLUMNS = 4
POINTS = 200  # of a spectrum
Line = tuple[ArrayLike, ArrayLike]  # x [K], y [K]


def lines(
  path: str | Path,
  cases: Mapping[str, Mapping[str, Line]],
  *,
  xlabel: str,
  ylabel: str,
  log_x: bool = False,
  level: Mapping[str, float] | None = None,
) -> None:
  """Small multiples of y against x, with axes that all panels share.

  Args:
    path: PNG to write.
    cases: heading -> method -> (x, y); y is positive.
    xlabel: below the figure.
    ylabel: left of it.
    log_x: whether x is on a logarithmic axis as y is.
    level: heading -> a value of y marked by a dotted line.
  """
  _check(cases)
  methods = [*dict.fromkeys(m for case in cases.values() for m in case)]
  looks = style.looks(methods, ())
  columns = min(COLUMNS, len(cases))
  rows = -(-len(cases) // columns)
  wide = 4.6 if columns == 1 else 2.4 * columns
  figure = style.canvas(wide, 0.9 + (2.9 if rows == 1 else 1.9 * rows))
  grid = figure.subplots(
    rows, columns, sharex=True, sharey=True, squeeze=False
  ).flat
  for axes, (heading, case) in zip(grid, cases.items(), strict=False):
    for method, (x, y) in case.items():
      axes.plot(x, y, linewidth=1.4, label=display(method), **looks[method])
    if level is not None:
      axes.axhline(
        level[heading], color=style.INK, linewidth=0.8, linestyle=(0, (1, 2))
      )
    axes.set_yscale("log")
    style.tidy(axes, grid="both")
    if log_x:
      _powers(axes, [x for x, _ in case.values()])
    axes.minorticks_off()
    axes.set_title(heading, size=style.TEXT, color=style.INK, loc="left")
  for axes in [*grid][len(cases) :]:
    axes.set_visible(False)
  text = {"size": style.TEXT, "color": style.INK}
  figure.supxlabel(xlabel, **text)
  figure.supylabel(ylabel, **text)
  handles = {
    name: handle
    for axes in figure.axes
    for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
  }
  figure.legend(
    handles.values(),
    handles.keys(),
    loc="outside upper left",
    ncols=len(handles) if columns > 2 else 2,
    fontsize=style.SMALL,
    frameon=False,
  )
  style.finish(figure, path, "")


def spectra(path: str | Path, eigenvalues: Mapping[str, ArrayLike]) -> None:
  """Eigenvalues of each block, largest first; those at 0 are left out.

  Args:
    path: PNG to write.
    eigenvalues: block -> [any], its layers together.
  """
  found = {}
  for name, values in eigenvalues.items():
    ordered = np.sort(np.ravel(values))[::-1]
    count = int((ordered > 0).sum())
    places = np.unique(np.geomspace(1, max(count, 1), POINTS).astype(int))
    if count:
      found[name] = places, ordered[places - 1]
  lines(
    path,
    {"": found},
    xlabel="place of the direction",
    ylabel="eigenvalue",
    log_x=True,
  )


def _powers(axes: "Axes", xs: list[ArrayLike]) -> None:
  """A logarithmic axis that names the values on it, if they are few."""
  axes.set_xscale("log")
  values = np.unique(np.concatenate([np.asarray(x, float) for x in xs]))
  if len(values) <= 8:
    axes.set_xticks(values, [f"{x:g}" for x in values])


def _check(cases: Mapping[str, Mapping[str, Line]]) -> None:
  if not cases or not all(cases.values()):
    raise ValueError("cases needs one panel or more, with a line in each")
  for heading, case in cases.items():
    for method, (x, y) in case.items():
      if np.shape(x) != np.shape(y) or np.ndim(y) != 1:
        raise ValueError(
          f"{heading}, {method!r}: x {np.shape(x)} and y {np.shape(y)} must be"
          " lists of the same length"
        )
      if not np.all(np.asarray(y) > 0):
        raise ValueError(
          f"{heading}, {method!r}: a logarithmic axis needs y > 0, got"
          f" {np.min(y)}"
        )
