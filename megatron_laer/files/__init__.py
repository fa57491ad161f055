"""Files are checked before they are read and written so that a killed run leaves none half done.

This is the lowest layer: nothing here knows what the files are for.
"""
