"""Rows that say where their images belong, and rows that bring a whole conversation."""
