"""Images and captions: sources, decoding, validation, shards, and the data set that training reads."""
