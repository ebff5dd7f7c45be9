"""Chat templates that options or adapters put in the place of a checkpoint's own."""
