"""What shows that vmcapture does what it says."""
