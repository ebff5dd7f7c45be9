"""What is passed on of a finished comparison: its predictions, to the hub."""
