"""Keeps a run of one host alive: starts its processes, finds what died or hangs, says what it was, starts again."""
