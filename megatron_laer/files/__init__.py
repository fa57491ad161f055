"""Checked reading and safe writing of files for any purpose; this is the lowest layer."""
