"""The command `imdc`."""
