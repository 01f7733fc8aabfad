"""The loss of a training run, against that of held-out data."""

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from tda.report import style


def curve(
  path: str | Path,
  losses: ArrayLike,
  held_out: float,
  *,
  unit: str = "nats per token",
  points: int = 100,
) -> None:
  """Means over parts of the run, and a dashed line for the held-out loss.

  Args:
    path: PNG to write.
    losses: [S], of each step.
    held_out: at the end of the run.
    unit: of both.
    points: the most parts that are drawn; each is a mean over its steps.
  """
  losses = np.asarray(losses, float)
  if losses.ndim != 1 or not losses.size:
    raise ValueError(f"losses of shape {losses.shape}; it takes [S], S > 0")
  parts = np.array_split(losses, min(points, len(losses)))
  ends = np.cumsum([len(part) for part in parts])
  figure = style.canvas(4.6, 2.9)
  axes = figure.add_subplot()
  axes.plot(ends, [part.mean() for part in parts], color=style.BLUE)
  axes.axhline(held_out, color=style.INK, linewidth=1, linestyle=(0, (4, 3)))
  axes.annotate(
    f"held out {held_out:.3f}",
    (1, held_out),
    xycoords=axes.get_yaxis_transform(),
    xytext=(0, 3),
    textcoords="offset points",
    ha="right",
    size=style.SMALL,
    color=style.INK,
  )
  style.tidy(axes, grid="y")
  axes.set_xlabel("step", size=style.TEXT, color=style.INK)
  axes.set_ylabel(unit, size=style.TEXT, color=style.INK)
  style.finish(figure, path, "")
