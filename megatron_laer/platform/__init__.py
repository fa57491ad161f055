"""What depends on the machine and on the installation, not on the model."""
