"""Checked reading and safe writing of files; a killed run leaves none half written.

This is the lowest layer: nothing here knows a file's purpose.
"""
