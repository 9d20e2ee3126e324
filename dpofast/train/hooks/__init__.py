"""The methods that scripts override or read: the loss, the evaluation and the settings."""
