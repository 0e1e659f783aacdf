"""Faults on purpose: a supervised run under a seeded schedule of injuries, compared with one that had none."""

from anychip.supervise.chaos.rehearsal import Chaos, chaos

__all__ = ["Chaos", "chaos"]
