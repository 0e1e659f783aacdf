"""The decoder, its initialisation, and the arithmetic of its parameters and FLOPs."""
