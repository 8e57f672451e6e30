"""How slots, arguments and counts correspond to those of other projects, and what a conversion would lose."""
