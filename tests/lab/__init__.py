"""The fault laboratory: acts on the n-th file operation of a save, and checks what is on the disk afterwards.

A new fault is one line in ``faults.FAULTS``. ``tap`` counts and disturbs, ``run`` has a job disturbed in a process of
its own, ``powercut`` says what a disk has when the power goes, ``invariants`` holds a directory against what is
promised, ``matrix`` does all of it at every operation and prints a table.
"""
