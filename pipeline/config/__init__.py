"""params.yaml as frozen, strict models."""
