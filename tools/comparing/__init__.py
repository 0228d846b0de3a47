"""The comparison of adapter methods: who takes part, at which rates, what was measured, and the table."""
