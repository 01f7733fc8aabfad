"""From a pure function of one example to the sites that use its parameters.

A leaf is followed through operations that only rename its entries (reshape,
transpose, slice, convert, ...), into jit, remat, cond and scan, both as
scanned operand and as constant. The first operation that does anything else
with it is its use: a *site* if the operation is bilinear in the parameter and
one activation, a *generic* use otherwise. Custom derivative rules are
respected, so a parameter that enters one is generic there; so is one that
enters a while loop, which reverse mode cannot differentiate anyway.

  finding.find(fn, params, example)   the uses, from shapes alone
  sharing.groups(program, leaves)     which uses concern the same entries
  evaluating.evaluate(program, ...)   runs it, handing each use to a callback
  equations                           what reading a jaxpr takes, one equation

No module outside this package reads jaxprs.
"""
