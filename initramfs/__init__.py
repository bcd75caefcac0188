"""The set-up side, in the healthy system: builds the capture image and arms the machine with it."""
