"""Benchmarks: ckptavg beside a plain read and write, and beside the scripts that people use.

Run from the repository root, so that the working tree is what gets measured::

    python -m tests.benchmarks compare --sets llama-bf16 --gb 0.5 --checkpoints 4
    python -m tests.benchmarks growth --gb 0.5
    python -m tests.benchmarks schemes --schemes 4
    python -m tests.benchmarks compare --help

Inputs are made in ``--work`` (default: a temporary directory, removed at the end) and every
contender runs as a process of its own. pytest collects nothing here.
"""
