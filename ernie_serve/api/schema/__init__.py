"""What clients may write into a request, checked once, at the door."""
