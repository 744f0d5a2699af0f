"""What ckptavg promises, tried under faults that are really there.

Bad inputs, kills and errors at every system call, power loss, full storage, files that change,
signals, memory limits. ``python -m tests.faults`` runs it all and prints a table of the promises.
"""
