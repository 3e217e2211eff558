"""Network parts that several families share."""
