"""The fault laboratory at work."""
