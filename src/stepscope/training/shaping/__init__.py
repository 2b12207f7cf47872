"""What reshapes a training: advantages per token, the influence they look at, the order of the prompts."""
