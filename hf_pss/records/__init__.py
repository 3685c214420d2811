"""Records of what happened, and the words for them."""
