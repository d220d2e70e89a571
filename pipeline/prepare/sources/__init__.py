"""Where images come from. One file a source; a source lists its items, reads them, and turns bytes into pixels.

A source holds paths and settings only, so that it can be sent to other processes and machines.
"""
