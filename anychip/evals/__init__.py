"""What a trained model is worth: bits per byte, baselines on the same text, sample answers."""
