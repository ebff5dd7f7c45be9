"""The engine over `transformers`."""
