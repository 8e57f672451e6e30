"""Everything that needs MXNet."""
