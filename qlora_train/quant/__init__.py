"""4-bit quantisation: the readable oracle, bitsandbytes, and the fingerprint of what was quantised."""
