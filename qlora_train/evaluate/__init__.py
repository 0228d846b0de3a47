"""Measuring a model: loss on held-out rows, generated answers, chat, and the distance between two models."""
