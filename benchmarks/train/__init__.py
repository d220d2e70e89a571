"""A whole training update beside those of the peers."""
