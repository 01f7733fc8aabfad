"""What a gradient store costs: logging, search from disk, search in memory.

    python -m experiments.benchmark_store [--smoke]

Logging: building a store of a decoder of 10 M parameters (random weights,
bytes), writing included, against a plain gradient of all parameters on the same
tokens, in interleaved rounds without compilation. A limit of about .7 is what
the operations allow, since no gradient of the weights is formed.

Search from disk: the first and last 100 of --rows random rows of 4,096 numbers
in bfloat16 for --queries queries, against `dd` reading the same files, both
after the system's cache is dropped (where the user may; else both from it), and
the memory that the search takes beyond what there was.

Search in memory: products of a store that is held on the device with one query,
against the bytes a second of the largest product of a matrix in float32 with
one vector, or on an accelerator of a sum over the same array.

Peers: build, search, query and retrieval beside bergson and LogIX, with the
first --dimension, with --part=peers; see `experiments.store_peers`.

Goals: logging at most .9 of a gradient, at least .8 of dd's speed in less than
1 GiB, and .7 of the memory's bandwidth. On two CPU cores: .57 with 16
directions of each side and .59 with 64 (.58 and .62 in the environment that the
README has for them); .97 GB/s where dd has 1.20, and .91 where it has .99 in
another hour, in 107 MiB with what is compiled; 1.07 of the sum's speed.
"""

import json
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from tqdm import tqdm

from experiments import store_peers, timing
from experiments.ekfac_stages import plain_gradient
from tda import meshes, streams
from tda.attribution import logra
from tda.data.packing import Rows
from tda.models import config as configs
from tda.models import decoder
from tda.store import disk, search
from tda.store.disk import Store
from tda.store.layout import Encoded, Span
from tda.store.search import Lens
from tda.streams import Loop

SMOKE = flags.DEFINE_bool("smoke", False, "Tiny sizes, one round.")
PARTS = ("logging", "disk", "memory", "peers")
PART = flags.DEFINE_multi_enum(
  "part",
  PARTS[:-1],
  PARTS,
  "Which to measure; peers have to be installed.",
)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Interleaved rounds.")
BATCH = flags.DEFINE_integer("batch", 8, "Sequences of a batch.")
LENGTH = flags.DEFINE_integer("length", 256, "Tokens of a sequence.")
SEQUENCES = flags.DEFINE_integer("sequences", 32, "That are logged.")
DIMENSIONS = flags.DEFINE_multi_integer("dimension", [16, 64], "Of each side.")
SITES = flags.DEFINE_enum("sites", "mlp", [*decoder.SITES], "That are logged.")
ROWS = flags.DEFINE_integer("rows", 1_000_000, "Of the store on disk.")
WIDTH = flags.DEFINE_integer("width", 4096, "Numbers of one of its rows.")
QUERIES = flags.DEFINE_integer("queries", 16, "Of the search from disk.")
FOLDER = flags.DEFINE_string("folder", None, "For stores; temporary if None.")
OUTPUT = flags.DEFINE_string(
  "output", None, "Where to write the figures: JSON."
)


def rounds(most: int | None = None) -> int:
  return 1 if SMOKE.value else min(most or ROUNDS.value, ROUNDS.value)


def logging(folder: Path) -> dict[str, float]:
  """Seconds of a plain gradient and of logging, and their ratios."""
  sizes = {"width": 320, "layers": 8, "heads": 5, "mlp_width": 864}
  length, count = LENGTH.value, SEQUENCES.value
  if SMOKE.value:
    sizes = {"width": 32, "layers": 2, "heads": 2, "mlp_width": 64}
    length, count = 32, 8
  config = configs.like("llama", 257, max_length=length, **sizes)
  init = jax.jit(decoder.Decoder(config).init)
  params = init(jax.random.key(0), jnp.zeros(1, jnp.int32))["params"]
  objective = decoder.objective(config)
  loop = Loop(BATCH.value, mesh=meshes.mesh())
  rng = np.random.default_rng(0)
  draw = lambda: rng.integers(0, 257, (count, length), np.int32)
  rows = {"x": draw(), "y": draw(), "mask": np.ones((count, length), np.int32)}

  gradient = plain_gradient(objective)

  def plain():
    jax.block_until_ready(streams.fold(gradient, params, rows, loop))

  runs: dict[str, Callable[[], object]] = {"gradient": plain}
  for dimension in DIMENSIONS.value:
    log = logra.logger(
      objective,
      params,
      rows,
      key=jax.random.key(1),
      dimension=dimension,
      select=decoder.SITES[SITES.value],
    )
    runs[f"dimension {dimension}"] = built(log, params, rows, folder, loop)
  seconds = timing.interleaved(rounds(), runs)
  tokens = count * length
  print(f"\nlogging {tokens} tokens, {SITES.value} sites, batches of {loop[0]}")
  found = {}
  for name, taken in seconds.items():
    found[name] = taken / seconds["gradient"]
    print(
      f"  {name:14} {taken:8.2f} s  {found[name]:5.2f} of a gradient"
      f"  {tokens / taken:9,.0f} tokens a second"
    )
  return found


def built(
  log: logra.Logger, params: dict, rows: Rows, folder: Path, loop: Loop
) -> Callable[[], object]:
  """Builds a store where there is none."""

  def run():
    path = folder / "logged"
    shutil.rmtree(path, ignore_errors=True)
    log.build(path, params, rows, loop=loop)

  return run


def random_store(folder: Path) -> Store:
  """Rows of normal numbers; one that is there is taken."""
  rows, width = (3000, 64) if SMOKE.value else (ROWS.value, WIDTH.value)
  path = folder / f"rows_{rows}_{width}"
  span = Span("random", 0, (), 1, 1, width)
  disk.create(path, [span], "bfloat16", {})
  if not disk.parts(path):
    store = disk.opened(path)
    disk.add(store, "random", disk.cut(store, np.ones(rows, int), 1, None))
  part, rng = disk.parts(path)[0], np.random.default_rng(0)
  for shard in tqdm(disk.missing(part), desc="writing"):
    count = len(part.inside(shard))
    values = rng.standard_normal((count, width), np.float32)
    disk.write(part, shard, "rows", values.astype(jnp.bfloat16)).result()
    disk.finish(part, shard, count, [""] * count)
  return disk.opened(path)


def from_disk(folder: Path) -> dict[str, float]:
  """Bytes a second of a search and of dd, and the memory it took."""
  store = random_store(folder)
  files = sorted((store.parts[0].path / "rows").rglob("c/*/0"))
  size = sum(file.stat().st_size for file in files)
  rng = np.random.default_rng(1)
  width = store.layout[0].stop
  lens = Lens(store, rng.standard_normal((QUERIES.value, width), np.float32))
  before = memory(anew=True)
  search.ends(lens, 100)  # compiles
  cold = timing.dropped()
  taken: dict[str, list[float]] = {"dd": [], "search": []}
  for _ in range(rounds(3)):
    timing.dropped()
    taken["dd"].append(timing.timed(lambda: read(files)))
    timing.dropped()
    taken["search"].append(timing.timed(lambda: search.ends(lens, 100)))
  after = memory()
  seconds = {k: statistics.median(x) for k, x in taken.items()}
  ratios = [d / s for d, s in zip(*taken.values(), strict=True)]
  found = {
    "dd": size / seconds["dd"],
    "search": size / seconds["search"],
    "ratio": statistics.median(ratios),
    "mebibytes": (after - before) / 2**20,
  }
  print(
    f"\nsearch of {store.rows} rows, {size / 1e9:.2f} GB, from"
    f" {'disk' if cold else 'the cache'}, {QUERIES.value} queries:"
    f" {found['search'] / 1e9:.2f} GB/s, dd {found['dd'] / 1e9:.2f} GB/s,"
    f" ratio {found['ratio']:.2f}, {found['mebibytes']:.0f} MiB more"
  )
  return found


def read(files: list[Path]) -> None:
  for file in files:
    subprocess.run(
      ["dd", f"if={file}", "of=/dev/null", "bs=8M", "status=none"], check=True
    )


def memory(*, anew: bool = False) -> float:
  """Bytes that the process has held at most, or holds, counted anew."""
  if anew:
    Path("/proc/self/clear_refs").write_text("5")
  lines = Path("/proc/self/status").read_text().splitlines()
  (peak,) = (x for x in lines if x.startswith("VmHWM"))
  return float(peak.split()[1]) * 1024


def in_memory() -> dict[str, float]:
  """Bytes a second of products with a store that the device holds."""
  count = 2000 if SMOKE.value else 2**16
  width = 64 if SMOKE.value else WIDTH.value
  on_cpu = jax.default_backend() == "cpu"
  dtype = jnp.float32 if on_cpu else jnp.bfloat16
  rows = jnp.ones((count, width), dtype)
  one = jnp.ones((1, width))
  spans = (Span("resident", 0, (), 1, 1, width),)
  scored = lambda: jax.block_until_ready(
    search.products(Encoded(rows, None), one, spans)
  )
  total = jax.jit(lambda x: jnp.sum(x, axis=1, dtype=jnp.float32))
  summed = lambda: jax.block_until_ready(total(rows))
  runs = {"products": scored, "total": summed}
  seconds = timing.interleaved(rounds(), runs)
  found = {k: rows.nbytes / x for k, x in seconds.items()}
  found["ratio"] = found["products"] / found["total"]
  print(
    f"\nsearch in memory, {dtype.__name__}: {found['products'] / 1e9:.1f} GB/s,"
    f" a sum over the rows {found['total'] / 1e9:.1f} GB/s,"
    f" ratio {found['ratio']:.2f}"
  )
  return found


def setting() -> store_peers.Setting:
  """What the flags say of the comparison with other libraries."""
  return store_peers.Setting(
    dimension=4 if SMOKE.value else DIMENSIONS.value[0],
    sites=SITES.value,
    rounds=rounds(),
    length=LENGTH.value,
    sequences=8 if SMOKE.value else SEQUENCES.value,
    queries=QUERIES.value,
    smoke=SMOKE.value,
  )


def main(_) -> None:
  print(f"{jax.devices()[0].device_kind}, {jax.device_count()} device(s)")
  found: dict[str, Any] = {}
  if "peers" in PART.value:  # before the others take their time
    store_peers.check(setting())
  with tempfile.TemporaryDirectory() as temporary:
    folder = Path(FOLDER.value or temporary)
    folder.mkdir(parents=True, exist_ok=True)
    if "logging" in PART.value:
      found["logging"] = logging(folder)
    if "disk" in PART.value:
      found["disk"] = from_disk(folder)
    if "memory" in PART.value:
      found["memory"] = in_memory()
    if "peers" in PART.value:
      found["peers"] = store_peers.measure(setting(), folder)
  if OUTPUT.value:
    Path(OUTPUT.value).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
