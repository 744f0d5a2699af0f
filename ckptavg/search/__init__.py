"""Which average is best: many of them from one read, each judged by the user's evaluation."""
