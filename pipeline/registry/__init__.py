"""The model registry: packaging a snapshot, registering and promoting it, and pinning the model to fine-tune."""
