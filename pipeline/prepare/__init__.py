"""The prepare stage: from a source of images to validated shards."""
