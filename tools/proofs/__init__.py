"""One module per claim that `make prove` measures again. Each has `measure(full) -> list[Bar]`."""
