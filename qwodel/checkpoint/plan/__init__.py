"""From a recipe and headers to a decision and a place for every tensor."""
