"""How a question becomes a prompt, and where in a response its answer stands."""
