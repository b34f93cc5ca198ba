"""The algorithms: stage modules, and below them networks, samplers, losses, pipelines and evaluation."""
