"""`anychip bench chip`: what the chip at hand reaches, as figures that `plan` can be calibrated with."""

from anychip.chips.bench.chip import describe, measure_chip

__all__ = ["describe", "measure_chip"]
