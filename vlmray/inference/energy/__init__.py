"""What the cards of a run took, as their driver counts it.

reading (in the replicas) -> adding (on the driver)
"""
