"""Data: from files to batches. Readers, cleaning, tokenizer, packed corpora, the sample schedule and its ledger."""
