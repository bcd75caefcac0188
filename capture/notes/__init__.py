"""What the ELF notes say: registers, VMCOREINFO."""
