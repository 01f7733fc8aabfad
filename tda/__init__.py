"""Training-data attribution in JAX.

Which training examples made the model do this, and what would it do had they
not been there? From a loss of one example to scores and to their evaluation:

  tracing, blocks, coverage   the uses of the parameters in a pure function
  taps, factors, gradients    per-example gradients inside the backward pass
  likelihoods                 losses with their sampling and output Hessians
  curvature                   labels, K-FAC, EK-FAC, diagonal, GGN, dense
  inverse                     functions of a curvature, applied to gradients
  attribution, scores         influence and baselines, by name
  streams, parts, checkpoints passes over data that save as they go
  trajectory, evaluation      training as a function; retraining, LDS, removal
  data, models, report        what the experiments need
  meshes, planning            where arrays lie, and what passes cost
"""

__version__ = "0.1.0"
