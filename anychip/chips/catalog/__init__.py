"""Published, reported and measured figures of accelerators: one YAML file per vendor. Needs no torch."""

from anychip.chips.catalog.load import find_chip, load_catalog, recognize_chip
from anychip.chips.catalog.schema import Chip, Figure

__all__ = ["Chip", "Figure", "find_chip", "load_catalog", "recognize_chip"]
