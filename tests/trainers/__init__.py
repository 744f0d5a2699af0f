"""Tiny training runs that save checkpoints with the trainers' own code, and the true weights.

Each maker runs by itself, from tests/: ``python -m trainers.dcp DIRECTORY``.
It leaves one folder per run, as the trainer leaves it, and ``truth/`` beside them.
"""
