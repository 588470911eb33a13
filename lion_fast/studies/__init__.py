"""Accuracy experiments: a grid of backbones, sets and methods, tuned alike, run over seeds, reported."""
