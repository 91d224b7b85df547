"""Model families: how one is recognised, and which of its layers stay as they are."""
