"""Real kernels that are crashed in QEMU, and what vmcapture saved of them."""
