"""A run that a server answers: looked at before it starts, its limit shared on the cluster, and watched."""
