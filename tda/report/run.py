"""The report of a run's folder: what it said, drew and was set to."""

import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

import tda
from tda import coverage, extras
from tda.coverage import Coverage
from tda.evaluation.workdir import Workdir
from tda.report import page
from tda.report.page import Figure, Page, Section, Table

RULE = re.compile(r"-+(?:  -+)*")  # below the header of `tables.aligned`


def write(
  workdir: Workdir,
  about: str,
  *sections: Section,
  settings: Mapping[str, Any],
) -> None:
  """Writes report.html into the folder.

  Args:
    workdir: of the run; all its PNGs are shown.
    about: the binary's docstring, whose first line is the title.
    sections: that only this binary has, which come first.
    settings: nested, all of them.
  """
  title, *_ = about.strip().splitlines()
  found = [
    *sections,
    Section("Results", [*read("\n".join(workdir.said))]),
    Section("Figures", [*figures(workdir.path)]),
    Section("Settings", [page.settings(settings), *_circumstances(workdir)]),
  ]
  found = [section for section in found if section.parts]
  lead = str(settings.get("name", workdir.path.name))
  file = workdir.path / "report.html"
  page.write(file, Page(title.rstrip("."), lead, found))


def read(printed: str) -> Iterator[str | Table]:
  """The paragraphs of a text, and the tables as `tables.aligned` made them.

  The line above a table's header is its caption.
  """
  for block in filter(str.strip, re.split(r"\n\s*\n", printed.strip("\n"))):
    lines = block.splitlines()
    rules = [i for i, line in enumerate(lines) if RULE.fullmatch(line)]
    if not rules or not rules[0]:
      yield block
      continue
    at = rules[0]
    ends = [part.span() for part in re.finditer("-+", lines[at])]
    ends[-1] = (ends[-1][0], None)  # type: ignore[assignment]
    cut = lambda line, ends=ends: [line[a:b].strip() for a, b in ends]
    caption = " ".join(lines[: at - 1])
    yield Table(cut(lines[at - 1]), [*map(cut, lines[at + 1 :])], caption)


def figures(folder: Path) -> Iterator[Figure]:
  """The PNGs of a folder in the order of names, with their descriptions."""
  for path in sorted(folder.glob("*.png")):
    with extras.package("PIL.Image", "a figure", "experiments").open(path) as x:
      text = x.info.get("Description", path.stem.replace("_", " "))
    yield Figure(path, text)


def covered(report: Coverage) -> Section:
  """Which blocks of the parameters are tracked."""
  header, *rows = coverage.cells(report)
  return Section("Coverage", [Table(header, rows, coverage.summary(report))])


def _circumstances(workdir: Workdir) -> Iterator[Table]:
  seconds = workdir.metrics().get("seconds")
  if seconds:
    rows = [(name, f"{value:.2f}") for name, value in seconds.items()]
    yield Table(["stage", "seconds"], rows, "How long each stage took")
  software = {
    "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
    "jax": jax.__version__,
    "python": platform.python_version(),
    "tda": tda.__version__,
  }
  yield page.settings(software, "What it ran on")
