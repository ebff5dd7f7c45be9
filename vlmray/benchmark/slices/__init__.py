"""Parts of a dataset: what samples are told apart by, and those on which a model got worse.

samples -> groups -> (scoreboard) -> finding -> report
"""
