"""Ablations: variants x seeds of a training, run by the trainers, with statistics and a plot."""
