"""What is written is what is read: values as texts, and text files without guesses at their types."""
