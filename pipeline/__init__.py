"""Crescendo: from a folder of images to a promoted high-resolution generator, reproducibly."""
