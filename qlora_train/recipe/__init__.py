"""The recipe: the validated, frozen description of a run, and the table of adapter methods."""
