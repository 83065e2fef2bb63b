"""The engine's loop: collect, admit, plan, dispatch; and the life of requests in it."""
