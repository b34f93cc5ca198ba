"""The algorithms: stage modules, and below them networks, samplers, losses, pipelines and evaluation."""

import os

# Before torch is imported. Once GNU OpenMP manages more threads than there are cores, as where rewards are computed
# beside sampling, it puts them to sleep at every barrier, and waking them takes longer than most operations here.
os.environ.setdefault("OMP_WAIT_POLICY", "active")
os.environ.setdefault("GOMP_SPINCOUNT", "300000")  # as without that policy, not for ever
