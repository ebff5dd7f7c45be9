"""What needs no network and no account: charts, questions about them, small models."""
