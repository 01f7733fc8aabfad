"""The last line of a binary: the report of its run."""

import sys

from absl import flags

from tda.evaluation.workdir import Workdir
from tda.report import run
from tda.report.page import Section


def write(workdir: Workdir, about: str, *sections: Section) -> None:
  """Writes WORKDIR/report.html, and says so.

  Its settings are the config's, and the flags of the binary itself.

  Args:
    workdir: of the run.
    about: the binary's docstring.
    sections: that come before what every run has.
  """
  own = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
  values = {flag.name: flag.value for flag in own}
  values.pop("workdir", None)
  config = values.pop("config", None)
  settings = config.to_dict() if config is not None else {}
  settings |= workdir.config | values
  run.write(workdir, about, *sections, settings=settings)
  print(f"report.html in {workdir.path}")
