"""Faults on purpose, in campaigns: races, crashes, tampering, bad requests and kills (`make chaos`)."""
