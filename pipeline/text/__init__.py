"""Captions as text, and the encoders that turn them into vectors."""
