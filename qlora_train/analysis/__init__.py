"""Instruments to look inside an adapter, and tools that make one adapter out of others."""
