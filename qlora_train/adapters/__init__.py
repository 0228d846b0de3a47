"""Adapters on the frozen base: PEFT builds, holds and names them; the layers' forward is ours."""
