"""The command line, `crescendo`."""
