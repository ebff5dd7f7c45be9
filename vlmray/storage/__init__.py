"""Files that appear whole, here or behind a URI: run folders, caches, the hub."""
