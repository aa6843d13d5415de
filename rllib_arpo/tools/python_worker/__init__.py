"""The program that runs model-written Python, in a process of its own.

Its modules import each other by relative names and nothing else of this package, so
that the folder alone can be bound into the sandbox.
"""
