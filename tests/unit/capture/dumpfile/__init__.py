"""The dump file."""
