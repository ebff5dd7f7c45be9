"""What is special about a family of models, a short file each."""
