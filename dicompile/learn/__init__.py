"""Learning what to cache: the frozen model as differentiable graphs, samplers, and what trains on them."""
