"""Any form of preference data, brought to one normal form."""
