"""A server that speaks OpenAI's protocol as an engine, with no more requests in flight than it takes.

flow -> shares -> gate; images -> wire -> client -> asking -> call -> engine
"""
