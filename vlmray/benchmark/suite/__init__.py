"""Several datasets in one comparison: each is a benchmark of its own, and one verdict is over all.

datasets (the file) -> job -> verdict -> report
"""
