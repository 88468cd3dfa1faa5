"""What only the book imports."""
