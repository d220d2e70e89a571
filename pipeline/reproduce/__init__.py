"""Making a registered version again, and comparing bits: `crescendo reproduce`."""
