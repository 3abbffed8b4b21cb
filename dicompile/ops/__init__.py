"""What operators are, as facts that every stage goes by, and tensor functions that several stages share."""
