"""Several answers of a row: drawn, put to a vote, and told apart from right ones."""
