"""Which slot, argument and count is which in other projects, and what would be lost on the way."""
