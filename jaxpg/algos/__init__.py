"""Algorithms: thin recipes over returns, baselines, the engine and Optax."""
