"""The model registry: packaging a snapshot, registering it, promoting it, and making pictures with it."""
