"""The OpenAI-compatible server: its door, its requests and answers, and the page beside it."""
