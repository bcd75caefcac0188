"""The capture side."""
