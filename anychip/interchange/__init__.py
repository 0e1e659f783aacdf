"""Into and out of the published Hugging Face layout, one tensor at a time."""
