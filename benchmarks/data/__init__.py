"""Data: decoding, preparation, loading and storage, each beside its peers."""
