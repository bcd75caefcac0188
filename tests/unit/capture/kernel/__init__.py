"""What memory says about the dead kernel."""
