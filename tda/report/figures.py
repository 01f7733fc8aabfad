"""Figures of an attribution experiment, each a function that writes one PNG.

Arrays are NumPy's or anything it converts. Figures are drawn with
matplotlib's objects on the Agg canvas: no window, no state of pyplot. An
interval is (mean, low, high), its ends as the caller computed them.

Notation: N training examples, Q queries, M subsets, K removal sizes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from tda.report import style
from tda.report.names import display
from tda.report.style import Interval

if TYPE_CHECKING:
  from matplotlib.axes import Axes


def lds_bars(
  path: str | Path,
  lds: Mapping[str, tuple[float, float, float]],
  *,
  ceiling: float | None = None,
  title: str = "How well each method predicts retraining",
) -> None:
  """Methods from best to worst, with intervals, under the noise ceiling.

  Args:
    path: PNG to write.
    lds: method -> (mean, low, high).
    ceiling: correlation of the measurement with its own repetition.
    title: of the figure; empty for none.
  """
  _check_intervals("lds", lds, shape=())
  methods = sorted(lds, key=lambda method: lds[method][0], reverse=True)
  mean, low, high = np.array([lds[method] for method in methods], float).T
  figure = style.canvas(6.4, 1.1 + 0.32 * len(methods))
  axes = figure.add_subplot()
  rows = np.arange(len(methods))
  axes.barh(rows, mean, height=0.68, color=style.BLUE, alpha=0.85)
  axes.hlines(rows, low, high, color=style.INK, linewidth=1.2)
  for row in rows:
    text = style.number(mean[row], "z.3f")
    text += (
      f" [{style.number(low[row], 'z.3f')}, {style.number(high[row], 'z.3f')}]"
    )
    axes.annotate(
      text,
      (1.02, row),
      xycoords=axes.get_yaxis_transform(),
      va="center",
      size=style.SMALL,
      color=style.INK,
      annotation_clip=False,
    )
  if ceiling is not None:
    axes.axvline(ceiling, color=style.INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
      f"noise ceiling {ceiling:.2f}",
      (ceiling, 1),
      xycoords=axes.get_xaxis_transform(),
      xytext=(0, 3),
      textcoords="offset points",
      ha="right",
      size=style.SMALL,
      color=style.INK,
    )
  style.tidy(axes, grid="x")
  axes.set_yticks(rows, [display(m) for m in methods], size=style.TEXT)
  axes.tick_params(axis="y", length=0)
  axes.invert_yaxis()
  axes.axvline(0, color=style.INK, linewidth=0.8)
  right = max(high.max(), ceiling or 0, 0)
  axes.set_xlim(min(0, 1.05 * low.min()), 1.02 * right or 1)
  axes.set_xlabel("linear datamodeling score", size=style.TEXT, color=style.INK)
  style.finish(figure, path, title)


def predicted_vs_actual(
  path: str | Path,
  predicted: ArrayLike,
  actual: ArrayLike,
  titles: Sequence[str],
  *,
  measurement: str = "loss",
) -> None:
  """One panel per query: each point a subset that was trained on.

  Args:
    path: PNG to write.
    predicted: [M, Q], the sum of scores over the excluded examples.
    actual: [M, Q], the measurement after retraining on the subset.
    titles: Q, above the panels.
    measurement: its name, on the axes.
  """
  predicted, actual = np.asarray(predicted), np.asarray(actual)
  if not predicted.shape == actual.shape == (len(predicted), len(titles)):
    raise ValueError(
      f"predicted {predicted.shape} and actual {actual.shape} must be"
      f" [subsets, queries], with as many titles ({len(titles)}) as queries"
    )
  columns = min(4, len(titles))
  rows = -(-len(titles) // columns)
  figure = style.canvas(0.5 + 2.3 * columns, 0.6 + 2.3 * rows)
  for query, text in enumerate(titles):
    axes = figure.add_subplot(rows, columns, query + 1)
    axes.scatter(
      predicted[:, query],
      actual[:, query],
      s=14,
      color=style.BLUE,
      alpha=0.55,
      linewidths=0,
    )
    style.tidy(axes, grid="both")
    # Room below the title for the axis' power of ten.
    axes.set_title(text, size=style.TEXT, color=style.INK, pad=12)
    axes.margins(0.06)
    axes.locator_params(nbins=4)
    axes.ticklabel_format(scilimits=(-2, 4), useMathText=True)
    for axis in (axes.xaxis, axes.yaxis):
      axis.get_offset_text().set(size=style.SMALL - 1, color=style.INK)
  figure.supxlabel(
    f"predicted change of the {measurement}", size=style.TEXT, color=style.INK
  )
  figure.supylabel(
    f"{measurement} after retraining", size=style.TEXT, color=style.INK
  )
  style.finish(figure, path, "")


def influential_images(
  path: str | Path,
  query_images: ArrayLike,
  train_images: ArrayLike,
  scores: ArrayLike,
  *,
  query_labels: Sequence[str],
  train_labels: Sequence[str],
  count: int = 5,
) -> None:
  """A row per query: the picture, then its most and least helpful examples.

  Args:
    path: PNG to write.
    query_images: [Q, H, W] or with 1 or 3 channels, in 0..1.
    train_images: [N, ...], likewise.
    scores: [N, Q], positive where leaving the example out raises the loss.
    query_labels: Q, below the queries.
    train_labels: N, below the examples.
    count: examples on each side, fewer if N is smaller.
  """
  queries, train = np.asarray(query_images), np.asarray(train_images)
  scores = np.asarray(scores)
  sizes = (len(train_labels), len(query_labels))
  if scores.shape != (len(train), len(queries)) or scores.shape != sizes:
    raise ValueError(
      f"scores {scores.shape} must be [train, queries]: there are"
      f" {len(train)} and {len(queries)} pictures, {sizes} labels"
    )
  count = min(count, len(train) // 2)
  widths = [1, 0.25, *[1] * count, 0.3, *[1] * count]
  figure = style.canvas(0.78 * sum(widths) + 0.2, 0.45 + 1.08 * len(queries))
  grid = figure.add_gridspec(len(queries), len(widths), width_ratios=widths)
  for row in range(len(queries)):
    order = np.argsort(-scores[:, row], kind="stable")
    axes = figure.add_subplot(grid[row, 0])
    _picture(axes, queries[row], query_labels[row], style.INK)
    if row == 0:
      axes.set_title("query", size=style.TEXT, color=style.INK, loc="left")
    for start, chosen, colour, heading in (
      (2, order[:count], style.BLUE, "most helpful"),
      (3 + count, order[::-1][:count], style.RED, "most harmful"),
    ):
      for place, example in enumerate(chosen):
        axes = figure.add_subplot(grid[row, start + place])
        score = style.number(scores[example, row], "+z#.2g")
        text = f"{train_labels[example]}\n{score}"
        _picture(axes, train[example], text, colour)
        if row == 0 and place == 0:
          axes.set_title(heading, size=style.TEXT, color=colour, loc="left")
  style.finish(figure, path, "")


def removal_curves(
  path: str | Path,
  ks: Sequence[int],
  loss_change: Mapping[str, Interval],
  flipped: Mapping[str, Interval],
  *,
  controls: Sequence[str] = ("random", "same class"),
  measurement: str = "loss",
) -> None:
  """What retraining without the k top-scored examples does to the queries.

  Args:
    path: PNG to write.
    ks: K numbers of removed examples.
    loss_change: method -> (mean, low, high), each [K]: mean over queries.
    flipped: method -> likewise, the fraction of queries no longer predicted
      right, 0..1; empty for regression, which leaves out its panel.
    controls: methods drawn in grey behind the others.
    measurement: its name, in the first title.
  """
  _check_intervals("loss_change", loss_change, shape=(len(ks),))
  if flipped:
    _check_intervals("flipped", flipped, shape=(len(ks),))
  looks = style.looks([*{**loss_change, **flipped}], controls)
  panels = [
    (loss_change, f"Change of the queries' {measurement}", "{x:g}"),
    (flipped, "Queries no longer predicted right", "{x:.0%}"),
  ]
  panels = [panel for panel in panels if panel[0]]
  figure = style.canvas(4.6 * len(panels), 3.5)
  for place, (curves, title, form) in enumerate(panels):
    axes = figure.add_subplot(1, len(panels), place + 1)
    _draw_curves(axes, np.asarray(ks, float), curves, looks)
    axes.yaxis.set_major_formatter(form)
    axes.set_title(title, size=style.TITLE, color=style.INK, loc="left")
    axes.set_xlabel(
      "removed training examples", size=style.TEXT, color=style.INK
    )
    axes.set_xticks(list(ks))
    if curves is flipped:
      # A fraction; and no empty range where nothing has flipped.
      axes.set_ylim(-0.01, max(axes.get_ylim()[1], 0.1))
    style.label_ends(axes, ks[-1], curves, looks)
  style.finish(figure, path, "")


def _draw_curves(
  axes: "Axes",
  ks: np.ndarray,
  curves: Mapping[str, Interval],
  looks: Mapping[str, dict[str, Any]],
) -> None:
  """Lines with whiskers, side by side where they would cover each other."""
  shift = 0.5 * np.diff(ks, append=2 * ks[-1] + 1).min() / len(curves)
  shift = min(shift, 0.008 * np.ptp(ks))
  for i, (method, interval) in enumerate(curves.items()):
    mean, low, high = (np.asarray(part, float) for part in interval)
    look = looks[method]
    x = ks + (ks > 0) * shift * (i - (len(curves) - 1) / 2)
    axes.plot(x, mean, linewidth=1.6, marker="o", markersize=3, **look)
    axes.vlines(
      x, low, high, color=look["color"], linewidth=0.9, alpha=0.55, zorder=2
    )
  style.tidy(axes, grid="y")
  axes.axhline(0, color=style.INK, linewidth=0.8, zorder=1)


def _picture(axes: "Axes", image: np.ndarray, text: str, colour: str) -> None:
  if image.ndim == 3 and image.shape[-1] == 1:
    image = image[..., 0]
  axes.imshow(image, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
  axes.set_xticks([])
  axes.set_yticks([])
  for spine in axes.spines.values():
    spine.set(color=colour, linewidth=1.2)
  axes.set_xlabel(text, size=style.SMALL - 1, color=style.INK, labelpad=2)


def _check_intervals(
  name: str, intervals: Mapping[str, Interval], shape: tuple[int, ...]
) -> None:
  if not intervals:
    raise ValueError(f"{name} is empty: there is no method to draw")
  for method, interval in intervals.items():
    shapes = [np.shape(part) for part in interval]
    if shapes != [shape] * 3:
      raise ValueError(
        f"{name}[{method!r}] must be (mean, low, high), each of shape"
        f" {shape}; its parts have shapes {shapes}"
      )
