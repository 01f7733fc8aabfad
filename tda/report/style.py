"""The looks that figures share: ink, canvases, lines, labels at their ends."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from tda import extras
from tda.report.names import display

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

Interval = tuple[ArrayLike, ArrayLike, ArrayLike]  # mean, low, high

INK = "#222222"
GREY = "#767676"
RULE = "#d9d9d9"
BLUE = "#0072b2"
RED = "#d55e00"
# Okabe and Ito's palette, told apart under every colour blindness; its yellow
# is too pale for a line on white and left out.
COLOURS = (BLUE, RED, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)))
SMALL, TEXT, TITLE = 8, 9, 10.5  # points


def canvas(width: float, height: float) -> "Figure":
  """Inches; matplotlib is an extra, so it is imported when first drawn."""
  load = lambda name: extras.package(name, "a figure", "experiments")
  figure = load("matplotlib.figure").Figure(
    figsize=(width, height), dpi=160, layout="constrained"
  )
  load("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
  return figure


def tidy(axes: "Axes", grid: str) -> None:
  """Axes with a grid ("x", "y" or "both") in place of their box."""
  for spine in axes.spines.values():
    spine.set_visible(False)
  axes.grid(axis=grid, color=RULE, linewidth=0.6)  # type: ignore[arg-type]
  axes.set_axisbelow(True)
  axes.tick_params(labelsize=SMALL, colors=INK, length=0)


def finish(figure: "Figure", path: str | Path, title: str) -> None:
  """Gives a figure its title, if any, and writes it.

  What it shows in words goes into the file as its description.
  """
  if title:
    figure.suptitle(title, size=TITLE, color=INK, x=0.01, ha="left")
  # No date or version inside: the same figure is the same file.
  metadata = {"Software": None, "Description": described(figure)}
  figure.savefig(path, format="png", metadata=metadata)


def described(figure: "Figure") -> str:
  """A figure's title, axes, panels and series, for those who do not see it."""
  axes = figure.axes
  each = lambda texts: [*dict.fromkeys(x for x in texts if x.strip())]
  across = each([figure.get_supxlabel(), *(x.get_xlabel() for x in axes)])
  up = each([figure.get_supylabel(), *(x.get_ylabel() for x in axes)])
  panels = each(x.get_title(loc=s) for x in axes for s in ("left", "center"))
  legends = [legend for x in axes if (legend := x.get_legend())]
  named = [t for x in (*figure.legends, *legends) for t in x.get_texts()]
  ticks = [t for x in axes for t in x.get_yticklabels()]
  words = [t.get_text() for t in ticks if t.get_text()[:1].isalpha()]
  texts = [t.get_text() for x in axes for t in x.texts]
  shown = each([*(t.get_text() for t in named), *words, *texts])
  sentences = [
    figure.get_suptitle(),
    " against ".join("; ".join(x) for x in (up, across) if x),
    panels and f"Panels: {'; '.join(panels)}",
    shown and f"Shown: {', '.join(shown)}",
  ]
  return ". ".join(" ".join(x.split()) for x in sentences if x)


def looks(
  methods: Sequence[str], controls: Sequence[str]
) -> dict[str, dict[str, Any]]:
  """The same colour and dashes for a method in every panel."""
  looks: dict[str, dict[str, Any]] = {}
  for i, method in enumerate(m for m in methods if m not in controls):
    colour = COLOURS[i % len(COLOURS)]
    dashes = DASHES[i // len(COLOURS) % len(DASHES)]
    looks[method] = {"color": colour, "linestyle": dashes, "zorder": 3}
  for i, method in enumerate(controls):
    dashes = DASHES[1:][i % 2]
    looks[method] = {"color": GREY, "linestyle": dashes, "zorder": 2}
  return looks


def label_ends(
  axes: "Axes",
  x: float,
  curves: Mapping[str, Interval],
  looks: Mapping[str, dict[str, Any]],
) -> None:
  """Names the curves at their right ends, pushed apart until they fit."""
  bottom, top = axes.get_ylim()
  axes.set_ylim(bottom, top)
  gap = 0.062 * (top - bottom)
  ends = {m: float(np.asarray(curve[0])[-1]) for m, curve in curves.items()}
  methods = sorted(ends, key=lambda method: ends[method])
  heights = spread([ends[method] for method in methods], gap, bottom, top)
  for method, height in zip(methods, heights, strict=True):
    colour = looks[method]["color"]
    axes.annotate(
      display(method),
      (x, ends[method]),
      xytext=(1.05, height),
      textcoords=axes.get_yaxis_transform(),
      va="center",
      size=SMALL,
      color=colour,
      annotation_clip=False,
      arrowprops={
        "arrowstyle": "-",
        "color": colour,
        "linewidth": 0.6,
        "alpha": 0.6,
        "shrinkA": 1,
        "shrinkB": 4,
        "relpos": (0, 0.5),
      },
    )


def spread(
  heights: Sequence[float], gap: float, bottom: float, top: float
) -> np.ndarray:
  """Ascending heights, moved as little as needed to lie `gap` apart.

  Neighbours that collide become a group around their mean, repeatedly: the
  least-squares answer (isotonic regression of heights - gap * index).
  """
  steps = gap * np.arange(len(heights))
  groups: list[tuple[float, int]] = []  # mean, size
  for height in np.asarray(heights, float) - steps:
    mean, size = float(height), 1
    while groups and groups[-1][0] > mean:
      before, count = groups.pop()
      mean = (before * count + mean * size) / (count + size)
      size += count
    groups.append((mean, size))
  moved = np.repeat([g[0] for g in groups], [g[1] for g in groups])
  high = max(top - gap * (len(heights) - 1), bottom)
  return np.clip(moved, bottom, high) + steps


def number(value: float, form: str) -> str:
  """A number in a format, with a real minus sign."""
  return format(value, form).replace("-", "−")
