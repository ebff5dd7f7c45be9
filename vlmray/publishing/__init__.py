"""Passing results on: cards, and pushing to the Hugging Face hub."""
