"""Numbers in, numbers out: attention backends behind one protocol, and their choice."""
