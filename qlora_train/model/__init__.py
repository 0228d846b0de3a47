"""The frozen base: where it comes from, how it is loaded in 4 bit, and its output head."""
