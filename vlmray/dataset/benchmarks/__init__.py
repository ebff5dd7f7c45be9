"""Benchmarks whose files keep a row in pieces, as rows like any other's: a question, an answer, an image."""
