"""Bytes of the dead kernel."""
