"""One function an equation."""
