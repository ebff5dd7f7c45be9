"""Runs over OpenAI's batch files: a line out for each line in."""
