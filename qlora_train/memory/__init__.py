"""What a run needs of memory, measured on one layer, and the fastest settings that fit."""
