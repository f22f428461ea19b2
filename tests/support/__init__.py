"""What several test folders share: problems to solve, and the implementations that solve them."""
