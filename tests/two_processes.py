"""One of two processes that attribute together: PORT, PROCESS, FOLDER.

Started by `test_distributed`, with four fake devices in each process.
"""

import sys
import time

import conformance
import conftest  # noqa: F401  the settings of every test
import jax
import jax.numpy as jnp
import numpy as np
import store_cases
import test_solvers
import tiny
from conformance import Variation
from test_streams import dataset, summed

from tda import meshes, records, streams
from tda.inverse import spectral
from tda.store import disk
from tda.streams import Loop

METHODS = ("gradient_cosine", "ekfac")
DAMPING = [spectral.absolute(0.1)]


def main(port: str, process: str, folder: str) -> None:
  jax.config.update("jax_num_cpu_devices", 4)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(
    f"127.0.0.1:{port}", 2, int(process), initialization_timeout=30
  )
  assert (jax.process_count(), len(jax.devices())) == (2, 8)
  assert meshes.agreed(process == "0") and not meshes.agreed(process == "1")
  loop = Loop(8, mesh=meshes.mesh(4, 2))
  total = resumed_sum(loop._replace(directory=f"{folder}/sum", save_every=0))
  scores = conformance.run(Variation(methods=METHODS, loop=loop))
  scores["stored"], scores["shards"] = stored(f"{folder}/store", loop)
  scores |= failing(f"{folder}/failing", loop, int(process))
  # Both have to keep what both hold, wherever the devices stand in the mesh.
  turned = jax.sharding.Mesh(
    loop.mesh.devices[::-1], ("data", "model"), axis_types=loop.mesh.axis_types
  )
  for name, mesh in (("turned", turned), ("whole", meshes.mesh(1, 8))):
    more = loop._replace(mesh=mesh)
    scores[name], _ = stored(f"{folder}/{name}", more, late=int(process))
  with jax.enable_x64(True):
    scores["cg"] = test_solvers.attribute(["cg"], DAMPING, loop=loop)[
      "cg"
    ].values
    derivative = tiny.replayed(meshes.mesh(4, 2))
    scores["unrolled"] = derivative.weights[0]
  np.savez(f"{folder}/scores_{process}.npz", total=total, **scores)


def stored(
  folder: str, loop: Loop, late: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """The rows of a store, and the shards that this process wrote.

  One process is late at knowing its data, by so many seconds.
  """
  written, write, digest = [], disk.write, records.digest
  records.digest = lambda tree: time.sleep(late) or digest(tree)
  disk.write = lambda part, number, name, values: (
    written.append(number) or write(part, number, name, values)
  )
  store = store_cases.build(folder, loop=loop)
  disk.write, records.digest = write, digest
  return store_cases.rows(store), np.array(written)


def failing(folder: str, loop: Loop, process: int) -> dict[str, np.ndarray]:
  """What is said where one process fails alone, and what was written after."""
  write = disk.write

  def full(part, number, name, values):
    raise OSError("No space left on device")

  def said(**options) -> str:
    try:
      store_cases.build(folder, loop=loop, **options)
    except ValueError as error:
      return str(error)
    return ""

  # As where one has other files, or draws another key.
  other = {"train": store_cases.data(seed=2)} if process == 0 else {}
  drawn = store_cases.logger(key=jax.random.key(process))
  strangers = {"names": ["one"]} if process == 1 else {}
  messages = [said(**other), said(log=drawn), said(**strangers)]
  disk.write = full if process == 1 else write
  messages.append(said())
  disk.write = write
  messages.append(said(dtype="int8"))
  rows, shards = stored(folder, loop)
  return {"said": np.array(messages), "again": rows, "left": shards}


def resumed_sum(loop: Loop) -> np.ndarray:
  """A sum that is stopped at its second batch, and taken up."""
  data, scale, seen, spread = dataset(), jnp.float32(1), [], meshes.spread

  def stopping(batch, over):
    seen.append(batch)
    if len(seen) == 2:
      raise KeyboardInterrupt
    return spread(batch, over)

  meshes.spread = stopping
  try:
    streams.fold(summed(), scale, data, loop)
  except KeyboardInterrupt:
    total, _ = streams.fold(summed(), scale, data, loop)
  meshes.spread = spread
  assert len(seen) == 3  # the first batch was not seen again
  return meshes.fetch(total)


if __name__ == "__main__":
  main(*sys.argv[1:])
