"""How good are the images? Features, statistics, metrics, and the rows that record them."""
