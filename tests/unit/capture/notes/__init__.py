"""What the ELF notes say."""
