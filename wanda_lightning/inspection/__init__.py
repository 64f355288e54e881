"""Looking at models without loading them."""
