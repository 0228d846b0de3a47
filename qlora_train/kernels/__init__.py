"""The fast paths. Each has a plain twin that it is tested against, and a switch."""
