"""DiffiT's attention and networks in other libraries.

A module for each, which imports that library only when it is used.
"""
