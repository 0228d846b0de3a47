"""The run folder: where everything is, and writes that are either whole or absent."""
