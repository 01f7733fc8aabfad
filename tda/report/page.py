"""A report as one HTML file that needs nothing beside it, and no network.

    write(path, Page(title, [Section("Queries", [ranking, ...]), ...]))

A section shows its parts in order: paragraphs, `Table`s, `Figure`s and
`Ranking`s of documents. A document opens on its text, in which each token is
coloured by its score: page.html says what is shown, page.css how it looks, and
page.js draws the tokens when a document is opened, so that thousands of
documents cost what their text does. Whatever stands in the parts is text, never
markup, and the file forbids every script but its own.
"""

import base64
import hashlib
import json
import math
import mimetypes
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tda import extras, parts

FOLDER = Path(__file__).parent
DENSITY = 160  # dots per inch of a PNG, as `style.canvas` draws them
STRONGEST = 3  # tokens of either sign that are named


class Table(NamedTuple):
  """Cells of text under a header."""

  header: Sequence[str]
  rows: Sequence[Sequence[str]]
  caption: str = ""


class Figure(NamedTuple):
  """A picture, and what it shows in words."""

  path: str | Path
  text: str


class Document(NamedTuple):
  """One of the ranked documents."""

  rank: int
  name: str
  score: float
  text: str = ""  # unless there are tokens
  tokens: Sequence[tuple[str, float]] = ()  # each with its score


class Ranking(NamedTuple):
  """A query, and the documents at the ends of its ranking."""

  query: str
  answer: str
  highest: Sequence[Document]
  lowest: Sequence[Document] = ()
  layers: Sequence[float] = ()  # share of each, first to last


class Section(NamedTuple):
  """A heading and what stands below it."""

  title: str
  parts: Sequence[str | Table | Figure | Ranking]


class Page(NamedTuple):
  """A title, a line below it, and sections."""

  title: str
  lead: str
  sections: Sequence[Section]


def write(path: str | Path, page: Page) -> None:
  """Writes a page; a file of that name is replaced when it is complete.

  Raises:
    ValueError: a page without sections, or a token whose score is not finite.
  """
  if not page.sections:
    raise ValueError(f"the page {page.title!r} has no sections to show")
  script = _asset("js")
  html = _template().render(
    page=page,
    style=_asset("css"),
    script=script,
    hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    rankings=[
      part
      for section in page.sections
      for part in section.parts
      if isinstance(part, Ranking)
    ],
  )
  with parts.replacing(Path(path)) as file:
    file.write(html.encode("utf-8", errors="replace"))


def settings(values: Mapping[str, Any], caption: str = "") -> Table:
  """A row for each value of a nested mapping, as "outer.inner"."""
  return Table(["setting", "value"], [*_flat(values, "")], caption)


def _template() -> Any:
  jinja2 = extras.package("jinja2", "a report", "experiments")
  env = jinja2.Environment(
    loader=jinja2.FileSystemLoader(FOLDER),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  for kind in (Table, Figure, Ranking):
    is_one = lambda part, kind=kind: isinstance(part, kind)
    env.tests[kind.__name__.lower()] = is_one
  env.filters |= {
    "anchor": lambda title: re.sub(r"\W+", "-", title.lower()),
    "heat": _heat,
    "image": _image,
    "largest": lambda ranking: max(
      (abs(x.score) for x in (*ranking.highest, *ranking.lowest)), default=0
    ),
    "numeric": _numeric,
    "percent": "{:.0%}".format,
    "signed": lambda x: f"{x:+#.3g}".rstrip(".").replace("-", "−"),
  }
  return env.get_template("page.html")


def _asset(kind: str) -> Any:
  """The page's own style or script, which is markup as it stands."""
  markup = extras.package("markupsafe", "a report", "experiments").Markup
  return markup((FOLDER / f"page.{kind}").read_text("utf-8"))


def _heat(document: Document) -> dict[str, Any]:
  """A document's text, and the length and score of each of its tokens.

  Browsers drop carriage returns and zeros, which would shift what follows.
  """
  clean = lambda text: re.sub("[\r\0]", "", text)
  tokens = [(clean(text), float(score)) for text, score in document.tokens]
  if not all(math.isfinite(score) for _, score in tokens):
    raise ValueError(f"{document.name!r} has a token whose score is not finite")
  ordered = sorted(tokens, key=lambda token: token[1])
  first, last = ordered[:STRONGEST], ordered[: -STRONGEST - 1 : -1]
  return {
    "text": "".join(text for text, _ in tokens) or clean(document.text),
    "lengths": " ".join(str(len(text)) for text, _ in tokens),
    "scores": " ".join(f"{score:.3g}" for _, score in tokens),
    "raising": [token for token in last if token[1] > 0],
    "lowering": [token for token in first if token[1] < 0],
  }


def _image(figure: Figure) -> dict[str, Any]:
  """The file inside the page; a PNG at the size of its points."""
  path = Path(figure.path)
  data = path.read_bytes()
  kind, _ = mimetypes.guess_type(path.name)
  width = None
  if kind == "image/png":
    (pixels,) = struct.unpack(">I", data[16:20])
    width = round(pixels * 96 / DENSITY)
  encoded = base64.b64encode(data).decode()
  return {"source": f"data:{kind};base64,{encoded}", "width": width}


def _numeric(table: Table) -> list[bool]:
  """Which columns hold numbers, and perhaps their intervals or errors."""
  is_number = lambda cell: (
    re.search(r"\d", cell) and not re.search(r"[^\W\d_]{2}", cell)
  )
  columns = zip(*table.rows, strict=True)
  found = [all(is_number(x) for x in column if x) for column in columns]
  return found or [False] * len(table.header)


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
  for name, value in values.items():
    if isinstance(value, Mapping) and value:
      yield from _flat(value, f"{prefix}{name}.")
    else:
      shown = (
        value if isinstance(value, str) else json.dumps(value, default=str)
      )
      yield f"{prefix}{name}", shown
