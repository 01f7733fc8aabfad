"""Influence on language models: its tails, and where in the network it is."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from tda.evaluation.tails import Tail
from tda.report import style

LENGTH = 34  # letters of a query that are shown


def tail(
  path: str | Path,
  scores: ArrayLike,
  fits: Sequence[Tail | None],
  labels: Sequence[str],
) -> None:
  """Share of documents above an influence, both axes logarithmic.

  A power law is a straight line, and drawn thin and dashed where it is fitted.

  Args:
    path: PNG to write.
    scores: [D, Q]; those at or below 0 are left out.
    fits: of each query's largest scores (`tda.evaluation.tails`), or None.
    labels: of the queries, at most as many as there are colours.
  """
  scores = np.asarray(scores, float)
  if not len(labels) == scores.shape[1] == len(fits) <= len(style.COLOURS):
    raise ValueError(
      f"{len(labels)} labels and {len(fits)} fits for scores {scores.shape}:"
      f" one for each query, at most {len(style.COLOURS)}"
    )
  figure = style.canvas(5.4, 3.6)
  axes, lines = figure.add_subplot(), []
  for column, fit, colour in zip(scores.T, fits, style.COLOURS, strict=False):
    largest = np.sort(column[column > 0])[::-1]
    share = np.arange(1, len(largest) + 1) / len(scores)
    (line,) = axes.loglog(largest, share, color=colour, linewidth=1.4)
    lines.append(line)
    if fit is not None and len(largest):
      ends = np.array([fit.minimum, largest[0]])
      law = fit.size / len(scores) * (ends / fit.minimum) ** -fit.exponent
      axes.loglog(ends, law, color=style.INK, linewidth=0.8, linestyle="--")
  style.tidy(axes, grid="both")
  axes.set_xlabel("influence", size=style.TEXT, color=style.INK)
  axes.set_ylabel(
    "share of documents above it", size=style.TEXT, color=style.INK
  )
  axes.legend(
    lines,
    [_short(label) for label in labels],
    fontsize=style.SMALL,
    frameon=False,
    loc="lower left",
  )
  style.finish(figure, path, "")


def layers(path: str | Path, shares: ArrayLike, labels: Sequence[str]) -> None:
  """The share of each layer in the influence on each query.

  Args:
    path: PNG to write.
    shares: [L, Q], each query's summing to 1.
    labels: of the queries.
  """
  shares = np.asarray(shares, float)
  if shares.ndim != 2 or shares.shape[1] != len(labels):
    raise ValueError(
      f"shares {shares.shape} must be [layers, queries], {len(labels)} of them"
    )
  count, queries = shares.shape
  figure = style.canvas(1.9 + max(2.4, 0.22 * count), 0.9 + 0.26 * queries)
  axes = figure.add_subplot()
  image = axes.imshow(shares.T, aspect="auto", cmap="Blues", vmin=0)
  axes.set_yticks(range(queries), [_short(label) for label in labels])
  every = -(-count // 10)
  shown = range(0, count, every)
  axes.set_xticks(shown, [str(layer + 1) for layer in shown])
  axes.tick_params(labelsize=style.SMALL, colors=style.INK, length=0)
  axes.set_xlabel("layer", size=style.TEXT, color=style.INK)
  bar = figure.colorbar(image, ax=axes)
  bar.ax.tick_params(labelsize=style.SMALL, colors=style.INK, length=0)
  bar.set_label("share", size=style.SMALL, color=style.INK)
  style.finish(figure, path, "")


def _short(label: str) -> str:
  label = " ".join(label.split()).replace("$", r"\$")  # which starts formulas
  return label if len(label) <= LENGTH else f"{label[: LENGTH - 1]}…"


def correlations(
  path: str | Path, matrix: ArrayLike, labels: Sequence[str]
) -> None:
  """Correlations of every two queries, those of one task together.

  Args:
    path: PNG to write.
    matrix: [Q, Q], from -1 to 1.
    labels: of the tasks [Q], equal ones next to each other.
  """
  matrix = np.asarray(matrix, float)
  if matrix.shape != (len(labels), len(labels)):
    raise ValueError(f"{len(labels)} labels for correlations {matrix.shape}")
  figure = style.canvas(5.0, 4.2)
  axes = figure.add_subplot()
  image = axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
  starts = [i for i, x in enumerate(labels) if i == 0 or x != labels[i - 1]]
  ends = [*starts[1:], len(labels)]
  for end in ends[:-1]:
    axes.axhline(end - 0.5, color=style.INK, linewidth=0.6)
    axes.axvline(end - 0.5, color=style.INK, linewidth=0.6)
  middles = [(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)]
  names = [_short(labels[start]) for start in starts]
  axes.set_xticks(middles, names, rotation=45, ha="right", size=style.SMALL)
  axes.set_yticks(middles, names, size=style.SMALL)
  axes.tick_params(length=0)
  bar = figure.colorbar(image, shrink=0.8)
  bar.set_label("Pearson correlation", size=style.TEXT, color=style.INK)
  style.finish(figure, path, "")
