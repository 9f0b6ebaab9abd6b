"""Scripts to start from; `bigkit launch --example` writes a copy of one into the current folder.

Leaves out: anything that the library needs; nothing imports these.
"""
