"""Lines with bands: one panel for each subject, drawn to one PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from tda.report import style
from tda.report.names import display

Band = tuple[ArrayLike, ArrayLike]  # mean [K], standard error [K]


def panels(
  path: str | Path,
  x: ArrayLike,
  subjects: Mapping[str, Mapping[str, Band]],
  *,
  xlabel: str,
  ylabel: str,
  references: Mapping[str, Mapping[str, ArrayLike]] | None = None,
  controls: Sequence[str] = ("random",),
  percent: bool = True,
) -> None:
  """Means over repetitions with a band of one standard error.

  Args:
    path: PNG to write.
    x: [K].
    subjects: title -> method -> (mean, standard error), each [K].
    xlabel: below the panels.
    ylabel: left of the first.
    references: title -> name -> [K], thin lines such as the best possible,
      the first dotted and the others in longer and longer dashes.
    controls: methods drawn in grey.
    percent: whether y is a fraction too, shown as a percentage as x is.
  """
  x = np.asarray(x, float)
  methods = [*dict.fromkeys(m for band in subjects.values() for m in band)]
  looks = style.looks(methods, controls)
  figure = style.canvas(4.9 * len(subjects), 4.0)
  for place, (title, bands) in enumerate(subjects.items()):
    axes = figure.add_subplot(1, len(subjects), place + 1)
    for method, band in bands.items():
      mean, error = (np.asarray(part, float) for part in band)
      if mean.shape != x.shape or error.shape != x.shape:
        raise ValueError(
          f"{title}, {method!r}: mean {mean.shape} and standard error"
          f" {error.shape} must be {x.shape}, as x is"
        )
      axes.plot(x, mean, linewidth=1.4, label=display(method), **looks[method])
      colour = looks[method]["color"]
      axes.fill_between(
        x, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0
      )
    for i, (name, line) in enumerate((references or {}).get(title, {}).items()):
      dots = (0, (1 + 4 * i, 2))
      axes.plot(
        x, line, linewidth=0.9, label=name, color=style.INK, linestyle=dots
      )
    style.tidy(axes, grid="both")
    axes.xaxis.set_major_formatter("{x:.0%}")
    if percent:
      axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_title(title, size=style.TITLE, color=style.INK, loc="left")
    axes.set_xlabel(xlabel, size=style.TEXT, color=style.INK)
    if place == 0:
      axes.set_ylabel(ylabel, size=style.TEXT, color=style.INK)
    if place == len(subjects) - 1:
      axes.legend(
        fontsize=style.SMALL,
        frameon=False,
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
      )
  style.finish(figure, path, "")
