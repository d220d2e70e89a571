"""What may be removed of working state, and removing it: `crescendo clean`."""
