"""One typed, closed configuration tree."""
