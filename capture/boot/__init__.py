"""The whole job on a crash boot."""
