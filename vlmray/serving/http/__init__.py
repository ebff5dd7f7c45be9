"""HTTP around a gateway: routes, keys, bounds, bodies, pages."""
