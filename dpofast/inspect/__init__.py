"""Shows a pair or a packed row in the terminal, as the model sees it."""
