"""How sure a model is, and how far that can be relied on."""
