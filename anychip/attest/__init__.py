"""Where a model comes from, in a way that others can check: pinned inputs, a chain of what happened, signatures, a
release, and a verifier of its own (`check`)."""
