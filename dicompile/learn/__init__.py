"""Learning what to cache: the frozen model as differentiable graphs, runs to learn from, and what trains on them."""
