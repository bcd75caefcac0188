"""Bytes of the dead kernel: source → ELF core header → memory image."""
