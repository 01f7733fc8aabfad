"""A run's report reads its tables back and finds its figures and settings."""

import html
import itertools
import re

import pytest

pytest.importorskip("jinja2")

from tda.evaluation.workdir import Workdir
from tda.report import convergence, curves, run, tables
from tda.report.page import Section, Table
from tda.report.tables import Row


def test_a_printed_table_is_read_back_as_it_was():
  rows = [Row("ekfac", 0.5, -0.41, 0.6), Row("gradient_dot", 0.2, 0.1, 0.3)]
  printed = tables.text(rows, ceiling=0.9)
  said = f"two methods\nin one run\n\nScores\n{printed}\n\n\nafter"
  before, table, after = run.read(said)
  assert (before, after) == ("two methods\nin one run", "after")
  assert table == Table(
    ["method", "LDS [low, high]"],
    [
      ["EK-FAC", "0.500 [-0.410,  0.600]"],
      ["gradient dot product", "0.200 [ 0.100,  0.300]"],
      ["noise ceiling", "0.900"],
    ],
    "Scores",
  )


def test_cells_may_be_empty_and_the_last_one_ragged():
  header, body = ["a", "b", "c"], [["x", "", "one two"], ["", "y", ""]]
  (table,) = run.read(tables.aligned(header, body))
  assert (table.header, table.rows, table.caption) == (header, body, "")
  assert [*run.read("")] == [] and [*run.read("---\n\n- a")] == ["---", "- a"]


def test_figures_say_what_they_show(tmp_path):
  line = ([1, 2], [0.1, 0.2])
  convergence.lines(
    tmp_path / "b.png",
    {"first": {"ekfac": line}, "second": {"cg": line}},
    xlabel="iteration",
    ylabel="error",
  )
  panels = {"digits": {"kfac": ([0.1, 0.2], [0.01, 0.01])}}
  curves.panels(
    tmp_path / "a.png", [1, 2], panels, xlabel="kept", ylabel="accuracy"
  )
  first, second = run.figures(tmp_path)
  assert first.text == "accuracy against kept. Panels: digits. Shown: K-FAC"
  assert second.text == (
    "error against iteration. Panels: first; second. Shown: EK-FAC, CG"
  )


def test_a_report_has_what_the_run_said_and_every_setting(tmp_path):
  workdir = Workdir(tmp_path, {"seed": 3})
  workdir.record("seconds", {"train": 1.5})
  workdir.say(tables.aligned(["method", "LDS"], [["EK-FAC", "0.5"]]))
  run.write(
    workdir,
    "How good?\n\nLong.",
    Section("First", ["some words"]),
    settings={"seed": 3, "model": {"width": 8}},
  )
  text = (tmp_path / "report.html").read_text()
  headings = re.findall("<h[12][^>]*>(.*)</h", text)
  assert headings == ["How good?", "First", "Results", "Settings"]
  cells = re.findall("<t[dh][^>]*>(.*)</t", html.unescape(text))
  pairs = {*itertools.pairwise(cells)}
  expected = ("EK-FAC", "0.5"), ("model.width", "8"), ("train", "1.50")
  assert {*expected} <= pairs and "jax" in cells
