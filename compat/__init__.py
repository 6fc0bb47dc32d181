"""Everything that touches Flower's inside."""
