"""What memory says about the dead kernel: names, log, panic."""
