"""Tuning after pretraining: data and losses for the same training loop."""
