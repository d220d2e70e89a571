"""Drills: a stage is killed over and over on the user's own machine, and compared with one that was not."""
