"""Predict time, memory and days of a training run before it is paid for, and search layouts. No torch."""
