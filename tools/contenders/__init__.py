"""Those that `tools/bench.py` compares: ways to train the same adapter on the same rows, each in its own process."""
