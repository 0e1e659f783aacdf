"""anychip: plan, train, grow, tune, prove and serve large language models on any chip."""

__version__ = "0.1.0"
