"""Code that depends on the machine and the installed Megatron, but not on FSEP, lives here."""
