"""Starts: what A and B are before the first step, and what is taken from the base for it."""
