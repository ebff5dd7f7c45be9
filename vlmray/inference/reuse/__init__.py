"""One answer for all rows that ask the same: of a call, of a run and, in a cache, of many runs.

    row -> request_key -> taking_over, around the one call of the engine
                              Answers (memory, a cache's parts) <- a replica's own, or an actor's for all

What is shared is what an engine says to a request, greedily drawn; everything else of a row is its own. It is
a saving and nothing more: what is lost or damaged is asked again.
"""
