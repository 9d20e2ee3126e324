"""A pair or a packed row, shown as the model sees it."""
