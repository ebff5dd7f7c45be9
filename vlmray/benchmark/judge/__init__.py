"""A model that grades what other models answered, where no rule can.

JudgeConfig, result rows -> judge_rows -> Judged: a grade of each answer, or why there is none
"""
