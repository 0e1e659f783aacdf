"""Talking to a model: inference weights, generation, sampling, terminal chat, generation for scripts."""
