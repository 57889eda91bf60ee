"""`python -m tools.drift_walk`: what an operator sees when one tenant's traffic shifts and another's does not."""
