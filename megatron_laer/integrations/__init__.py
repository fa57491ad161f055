"""Frameworks around Megatron Core, with loops and configurations of their own, are served here."""
