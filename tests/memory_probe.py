"""What a fresh process says of its own anonymous memory; its script begins with ``WATCH``."""

# watched() samples RssAnon every 2 ms; .baseline is what it was, .largest the largest, in bytes
WATCH = """
import re, threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\\s*(\\d+)", status)[1]) * 1024

@contextmanager
def watched(seen):
    done = threading.Event()
    def watch():
        while not done.wait(0.002):
            seen.largest = max(seen.largest, anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:  # else an error would leave the process waiting for the thread
        done.set()
        thread.join()
    seen.largest = max(seen.largest, anonymous())

def here():
    return SimpleNamespace(baseline=anonymous(), largest=0)
"""
