"""Clients that load what `export` wrote, each as its users run it."""
