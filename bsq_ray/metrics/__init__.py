"""Image metrics that stream: each worker updates its own, the states are merged, the result is computed once."""
