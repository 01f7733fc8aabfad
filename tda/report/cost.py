"""Accuracy against what it costs: iterations, and seconds.

Notation: K points of a curve. A method without iterations is a curve of one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from tda.report import style, tables
from tda.report.names import display


class Curve(NamedTuple):
  """How good a method is after some iterations, each [K]."""

  iterations: ArrayLike  # ascending; one 0 for a method that has none
  seconds: ArrayLike  # until then, what it needs beforehand included
  mean: ArrayLike  # of the accuracy, over queries
  low: ArrayLike  # ends of its interval
  high: ArrayLike


def figure(
  path: str | Path,
  curves: Mapping[str, Curve],
  *,
  accuracy: str = "correlation",
  title: str = "",
) -> None:
  """Two panels of the same accuracies, over iterations and over seconds.

  Args:
    path: PNG to write.
    curves: method -> curve. One without iterations is a level in the first
      panel and a point in the second.
    accuracy: what the vertical axis shows.
    title: of the figure; empty for none.
  """
  _check(curves)
  looks = style.looks([*curves], ())
  canvas = style.canvas(9.2, 3.9)
  left, right = canvas.subplots(1, 2, sharey=True)
  for method, curve in curves.items():
    look, level = looks[method], _level(curve)
    if level:
      _draw_level(left, curve, look)
    else:
      _draw(left, curve.iterations, curve, look, marker="")
    _draw(right, curve.seconds, curve, look, marker="D" if level else "o")
  for axes, text in ((left, "iterations"), (right, "seconds")):
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:g}")
    style.tidy(axes, grid="both")
    axes.set_xlabel(text, size=style.TEXT, color=style.INK)
  left.set_ylabel(accuracy, size=style.TEXT, color=style.INK)
  last = max(float(np.max(curve.seconds)) for curve in curves.values())
  ends = {m: (c.mean, c.low, c.high) for m, c in curves.items()}
  style.label_ends(right, last, ends, looks)
  style.finish(canvas, path, title)


def text(
  curves: Mapping[str, Mapping[str, Curve]], shown: tuple[int, ...] = ()
) -> str:
  """A table: a row for each method and number of iterations.

  Args:
    curves: accuracy -> method -> curve; the same methods and iterations.
    shown: the iterations to show besides each method's last; all if empty.
  """
  for by_method in curves.values():
    _check(by_method)
  first = next(iter(curves.values()))
  body = []
  for method, curve in first.items():
    counts, seconds = np.asarray(curve.iterations), np.asarray(curve.seconds)
    for k, count in enumerate(counts):
      if shown and count not in shown and k + 1 < len(counts):
        continue
      cells = [_interval(by_method[method], k) for by_method in curves.values()]
      name = display(method)
      body.append([name, f"{count or ''}", f"{seconds[k]:.2f}", *cells])
  header = ["method", "iterations", "seconds", *curves]
  return tables.aligned(header, body, [False, *[True] * (len(header) - 1)])


def _interval(curve: Curve, k: int) -> str:
  mean, low, high = (np.asarray(x, float)[k] for x in curve[2:])
  return f"{mean:z6.3f} [{low:z6.3f}, {high:z6.3f}]"


def _level(curve: Curve) -> bool:
  return not np.any(curve.iterations)


def _draw(axes, x, curve, look, marker):
  look = {k: v for k, v in look.items() if k != "linestyle"} | {
    "linestyle": look["linestyle"] if len(np.atleast_1d(x)) > 1 else ""
  }
  axes.plot(x, curve.mean, linewidth=1.6, marker=marker, markersize=4, **look)
  axes.fill_between(
    x, curve.low, curve.high, color=look["color"], alpha=0.12, linewidth=0
  )


def _draw_level(axes, curve, look):
  (mean,) = np.asarray(curve.mean, float)
  colour = look["color"]
  axes.axhline(mean, color=colour, linewidth=1.2, linestyle=(0, (4, 2)))


def _check(curves: Mapping[str, Curve]) -> None:
  if not curves:
    raise ValueError("there is no method to show")
  for method, curve in curves.items():
    shapes = [np.shape(part) for part in curve]
    if len(set(shapes)) != 1 or len(shapes[0]) != 1 or not shapes[0][0]:
      raise ValueError(f"the parts of {method!r} must all be [K], not {shapes}")
    if _level(curve) and shapes[0] != (1,):
      raise ValueError(
        f"{method!r} has {shapes[0][0]} points and no iterations to tell them"
      )
    if np.min(curve.seconds) <= 0:
      raise ValueError(f"the seconds of {method!r} must be positive")
