"""Tables to read beside a peer's: each compares Crescendo with others in one interleaved run."""
